"use strict";
const collator = new Intl.Collator(undefined, { numeric: true });
const numberOf = (cell) => (cell.dataset.number === undefined ? null : Number(cell.dataset.number));

function compared(left, right) {
  const [a, b] = [numberOf(left), numberOf(right)];
  if (a !== null && b !== null) return a - b;
  // What has no number stays behind those that have one.
  if (a !== null || b !== null) return a === null ? 1 : -1;
  return collator.compare(left.textContent, right.textContent);
}

function sortBy(table, column) {
  const heading = table.tHead.rows[0].cells[column];
  const falls = heading.getAttribute("aria-sort") === "ascending";
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", falls ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  rows.sort((a, b) => {
    const [left, right] = [a.cells[column], b.cells[column]];
    const missing = (numberOf(left) === null) !== (numberOf(right) === null);
    return falls && !missing ? compared(right, left) : compared(left, right);
  });
  body.append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sortBy(table, column));
    heading.append(button);
  });
}

const themes = document.querySelector(".theme");
function setTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  for (const button of themes.children) button.setAttribute("aria-pressed", String(button.dataset.theme === name));
}
function stored() {
  // A page opened as a file may have no storage.
  try {
    return localStorage.getItem("kdpipe-theme") || "auto";
  } catch {
    return "auto";
  }
}
for (const button of themes.children) {
  button.addEventListener("click", () => {
    setTheme(button.dataset.theme);
    try {
      localStorage.setItem("kdpipe-theme", button.dataset.theme);
    } catch {
      // It is then asked for again the next time.
    }
  });
}
setTheme(stored());
themes.hidden = false;
