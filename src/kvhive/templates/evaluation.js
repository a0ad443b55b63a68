"use strict";
(() => {
  const by = (id) => document.getElementById(id);
  const made = (name, text = "", kind = "") => {
    const element = document.createElement(name);
    element.textContent = text;
    element.className = kind;
    return element;
  };

  // ---- sorting: numbers by data-v, names by their text; a second time turns the order around
  const sorted = (body, column, up) => {
    const value = (row) => {
      const cell = row.cells[column];
      return cell.dataset.v === undefined ? cell.textContent.trim() : Number(cell.dataset.v);
    };
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
      const ascending = typeof x === "number" ? x - y : x.localeCompare(y);
      return up ? ascending : -ascending;
    };
    return [...body.rows].sort(order);
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") === "descending";
        for (const other of heads) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        table.tBodies[0].append(...sorted(table.tBodies[0], column, up));
      });
    });
  }

  // ---- filter: what has no budget, the full cache and the floor, always stays
  const lines = [...by("board").tBodies[0].rows].filter((row) => row.dataset.budget);
  const filter = () => {
    const budget = by("budget").value;
    const text = by("text").value.trim().toLowerCase();
    const gone = lines
      .filter(({ dataset }) => {
        const wanted = !budget || dataset.budget === budget;
        return !(wanted && dataset.recipe.toLowerCase().includes(text));
      })
      .map((row) => row.dataset.recipe);
    const away = new Set(gone);
    for (const element of document.querySelectorAll("[data-recipe]")) {
      element.toggleAttribute("hidden", away.has(element.dataset.recipe));
    }
    by("count").textContent = away.size ? `${lines.length - away.size} of ${lines.length} recipes` : "";
  };
  by("budget").addEventListener("input", filter);
  by("text").addEventListener("input", filter);

  // ---- sections: a link opens the one it leads to
  const sections = [...document.querySelectorAll("details.part")];
  const reveal = () => {
    const target = by(location.hash.slice(1));
    if (!sections.includes(target)) return;
    target.open = true;
    target.scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  reveal();
  by("open").addEventListener("click", () => sections.forEach((one) => (one.open = true)));
  by("close").addEventListener("click", () => sections.forEach((one) => (one.open = false)));

  // ---- a number's items, unpacked when they are asked for
  const unpack = (packed) => {
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  };
  const number = (value) => (value === undefined ? "" : Number(value).toPrecision(4));

  const itemTable = ({ facts, rows }, recipe, measure) => {
    const titles = ["item", measure, "full", "no context", "facts", "each probe"];
    const table = made("table");
    const head = table.createTHead().insertRow();
    for (const title of titles) {
      const cell = made("th", title);
      cell.scope = "col";
      head.append(cell);
    }
    const body = table.createTBody();
    for (const [item, [scores, probes, [kept, bytes]]] of Object.entries(rows[recipe])) {
      const [full, none] = ["full", "none"].map((name) => rows[name]?.[item]?.[0] ?? {});
      const told = Object.entries({ ...facts[item], kept, bytes });
      const cells = [
        made("td", number(scores[measure])),
        made("td", number(full[measure])),
        made("td", number(none[measure])),
        made("td", told.map(([name, value]) => `${name} ${value}`).join("\n"), "words"),
        made("td", probes.map(([of, text]) => `${number(of[measure])} ${text}`.trim()).join("\n"), "words"),
      ];
      cells.forEach((cell, place) => (cell.dataset.title = titles[place + 1]));
      const name = made("th", item);
      name.scope = "row";
      body.insertRow().append(name, ...cells);
    }
    return table;
  };

  document.addEventListener("click", async (event) => {
    const button = event.target.closest(".opens");
    if (!button) return;
    const cell = button.closest("td");
    const { recipe } = cell.parentElement.dataset;
    const { part, measure } = cell.closest("table").tHead.rows[0].cells[cell.cellIndex].dataset;
    const packed = by(`items-${part}`);
    const { task, mode } = packed.dataset;
    by("items-title").textContent = `${recipe}: ${task}, ${mode}, ${measure}`;
    by("items-list").replaceChildren(itemTable(await unpack(packed.textContent), recipe, measure));
    by("items").showModal();
  });
})();
