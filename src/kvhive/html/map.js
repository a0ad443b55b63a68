// Hover over a hive map: which layer, head and token it is, whether it was kept, and the words around.
(() => {
  const words = JSON.parse(document.getElementById("words")?.textContent ?? "[]");
  const tip = document.createElement("div");
  tip.className = "tip";
  document.body.append(tip);

  const element = (name, text) => {
    const made = document.createElement(name);
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
    const cross = map.querySelector(".cross");

    map.addEventListener("pointermove", (event) => {
      const box = map.getBoundingClientRect();
      const across = (event.clientX - box.left) / box.width;
      const token = Math.max(0, Math.min(seen - 1, Math.floor(across * seen)));
      const down = event.clientY - box.top;
      const row = Math.max(0, rows.findLastIndex(([, , top]) => top <= down));
      const [layer, head] = rows[row];
      let held = 0;
      for (let other = 0; other < rows.length; other++) held += kept(other, token);

      const place = element("p", `layer ${layer}, head ${head}, token ${token.toLocaleString("en")}: `);
      place.append(element("b", kept(row, token) ? "kept" : "evicted"));
      const context = element("q", "");
      context.append(words.slice(Math.max(0, token - 6), token).join(""));
      context.append(element("b", words[token] ?? ""));
      context.append(words.slice(token + 1, token + 7).join(""));
      tip.replaceChildren(place, element("p", `kept by ${held} of ${rows.length} heads`));
      if (words.length) tip.append(context);

      cross.style.left = `${across * 100}%`;
      tip.style.display = cross.style.display = "block";
      const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
      tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, room)) + scrollX}px`;
      tip.style.top = `${event.clientY + 18 + scrollY}px`;
    });
    map.addEventListener("pointerleave", () => {
      tip.style.display = cross.style.display = "none";
    });
  }
})();
