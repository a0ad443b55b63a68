// A hive map told in words: which layer, head and token it is, whether it was kept, and the text around.
(() => {
  const words = JSON.parse(document.getElementById("words").textContent);
  const within = (value, most) => Math.max(0, Math.min(most, value));
  const bold = (text) => {
    const made = document.createElement("b");
    made.textContent = text;
    return made;
  };

  for (const map of document.querySelectorAll("[data-map]")) {
    const seen = Number(map.dataset.seen);
    const [rowText, bitText] = map.dataset.map.split("|");
    const rows = rowText.split(";").map((row) => row.split(",").map(Number));
    const bits = Uint8Array.from(atob(bitText), (letter) => letter.charCodeAt(0));
    const stride = Math.ceil(seen / 8);
    const kept = (row, token) => (bits[row * stride + (token >> 3)] >> (token & 7)) & 1;
    const told = map.closest("figure").querySelector(".told");
    const [upright, level] = map.querySelectorAll(".cross");
    let [row, token] = [0, 0];

    const tell = () => {
      const [layer, head, top] = rows[row];
      const held = rows.reduce((sum, _, other) => sum + kept(other, token), 0);
      told.replaceChildren(
        `layer ${layer}, head ${head}, token ${token.toLocaleString("en")}: `,
        bold(kept(row, token) ? "kept" : "evicted"),
        `, kept by ${held} of ${rows.length} heads. \u2026`,
        words.slice(Math.max(0, token - 6), token).join(""),
        bold(words[token] ?? ""),
        words.slice(token + 1, token + 7).join(""),
        "\u2026",
      );
      upright.style.left = `${((token + 0.5) / seen) * 100}%`;
      level.style.top = `${top}px`;
      upright.style.display = level.style.display = "block";
    };

    map.addEventListener("pointermove", (event) => {
      const box = map.getBoundingClientRect();
      token = within(Math.floor(((event.clientX - box.left) / box.width) * seen), seen - 1);
      row = Math.max(0, rows.findLastIndex(([, , top]) => top <= event.clientY - box.top));
      tell();
    });

    const tenth = Math.max(1, Math.round(seen / 10));
    const steps = {
      ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
      PageUp: [0, -tenth], PageDown: [0, tenth], Home: [0, -seen], End: [0, seen],
    };
    map.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      row = within(row + step[0], rows.length - 1);
      token = within(token + step[1], seen - 1);
      tell();
    });
  }
})();
