// Sorts the tables by a click on a title, and filters their rows. The page reads as well without.
"use strict";
const valueOf = (cell) => {
  const text = cell.dataset.value ?? cell.firstChild?.textContent.trim() ?? "";
  const factor = {k: 1e3, m: 1e6}[text.slice(-1).toLowerCase()];  // 500k parameters
  const digits = (factor ? text.slice(0, -1) : text).replaceAll("_", "");
  const number = Number(digits) * (factor ?? 1);
  return digits === "" || Number.isNaN(number) ? text : number;
};
// Numbers by size, then words; an empty cell is last whichever way.
const compare = (one, other, sign) => {
  if (one === "" || other === "") return (one === "") - (other === "");
  if (typeof one !== typeof other) return typeof one === "number" ? -1 : 1;
  return sign * (typeof one === "number" ? one - other : one.localeCompare(other));
};
for (const table of document.querySelectorAll("table")) {
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, column) => {
    const button = document.createElement("button");
    button.textContent = title.textContent;
    title.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = title.getAttribute("aria-sort") === "ascending";
      titles.forEach((other) => other.removeAttribute("aria-sort"));
      title.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) =>
        compare(valueOf(a.cells[column]), valueOf(b.cells[column]), down ? -1 : 1));
      table.tBodies[0].append(...rows);
    });
  });
}
const runs = document.getElementById("runs");
const names = [...runs.tHead.rows[0].cells].map((title) => title.textContent);
const filter = document.getElementById("filter");
const matches = (row, word) => {
  const [field, ...value] = word.split("=");
  const column = names.indexOf(field);
  return value.length && column >= 0
    ? row.cells[column].textContent.trim() === value.join("=")
    : row.textContent.toLowerCase().includes(word.toLowerCase());
};
const apply = () => {
  const words = filter.value.split(/\s+/).filter(Boolean);
  const shown = new Set();
  for (const row of runs.tBodies[0].rows) {
    row.hidden = !words.every((word) => matches(row, word));
    if (!row.hidden) shown.add(row.id);
  }
  // A row of the first table stays if a run of it does.
  for (const row of document.getElementById("cells").tBodies[0].rows) {
    const links = [...row.querySelectorAll('a[href^="#"]')];
    row.hidden = words.length > 0 && !links.some((link) => shown.has(decodeURIComponent(link.hash.slice(1))));
  }
  document.getElementById("left").textContent =
    words.length ? `${shown.size} of ${runs.tBodies[0].rows.length} runs` : "";
};
filter.addEventListener("input", apply);
document.querySelector(".filter").hidden = false;
