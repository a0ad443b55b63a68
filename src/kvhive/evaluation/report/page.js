"use strict";
(() => {
  const rows = JSON.parse(document.getElementById("run").textContent);
  const dialog = document.getElementById("items");
  const number = (value) => (value === undefined ? "" : Number(value).toPrecision(4));

  const element = (name, text, kind) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };

  // ---- sorting: numbers by data-v, names by their text
  const sort = (table, column, up) => {
    const body = table.tBodies[0];
    const value = (row) => {
      const cell = row.cells[column];
      return cell.dataset.v === undefined ? cell.textContent.trim() : Number(cell.dataset.v);
    };
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (typeof x === "number" && typeof y === "number") return up ? x - y : y - x;
      if (typeof x === "number") return -1;
      if (typeof y === "number") return 1;
      return up ? x.localeCompare(y) : y.localeCompare(x);
    };
    body.append(...[...body.rows].sort(order));
  };

  document.querySelectorAll("table.sortable").forEach((table) => {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") === "descending";
        for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        sort(table, column, up);
      });
    });
  });

  // ---- a number's items
  const show = ([task, mode, recipe, measure]) => {
    const part = rows.filter((row) => row[0] === task && row[1] === mode);
    const of = (name) => new Map(part.filter((row) => row[2] === name).map((row) => [row[3], row]));
    const [ours, full, none] = [of(recipe), of("full"), of("none")];
    const table = element("table");
    const head = table.createTHead().insertRow();
    for (const title of ["item", measure, "full", "no context", "facts", "each probe"]) {
      head.append(element("th", title));
    }
    const body = table.createTBody();
    for (const [item, row] of ours) {
      const line = body.insertRow();
      line.append(element("th", item));
      for (const from of [row, full.get(item), none.get(item)]) {
        line.append(element("td", from ? number(from[4][measure]) : ""));
      }
      const facts = Object.entries(row[6]).map(([name, value]) => `${name} ${value}`).join("\n");
      line.append(element("td", facts, "text"));
      const probes = row[5].map(([scores, text]) => [number(scores[measure]), text].join(" ").trim());
      line.append(element("td", probes.join("\n"), "text"));
    }
    const place = dialog.querySelector("div");
    place.replaceChildren(element("h3", `${recipe}: ${task}, ${mode}, ${measure}`), table);
    dialog.showModal();
  };

  document.addEventListener("click", (event) => {
    const link = event.target.closest("[data-items]");
    if (!link) return;
    event.preventDefault();
    show(JSON.parse(link.dataset.items));
  });
  document.body.dataset.ready = "yes";
})();
