// Tables whose columns sort on a click, panes behind buttons, and cases that open in the viewer.
const number = (cell) => { const text = cell.textContent.trim(), value = parseFloat(text); return text === "" ? NaN : value; };
for (const table of document.querySelectorAll(".sortable table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const numeric = ![...body.rows].some((row) => /[a-z]/i.test(row.cells[column].textContent));
    const rows = [...body.rows].map((row) => [row, row.cells[column]]);
    rows.sort(([, a], [, b]) => {
      if (!numeric) return down * a.textContent.localeCompare(b.textContent);
      const x = number(a), y = number(b);
      // cells without a number stay last
      return isNaN(x) - isNaN(y) || (isNaN(x) ? 0 : down * (x - y));
    });
    body.append(...rows.map(([row]) => row));
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
  }));
}
for (const panes of document.querySelectorAll(".panes")) {
  const buttons = [...panes.querySelectorAll("button[data-pane]")], all = [...panes.querySelectorAll(".pane")];
  const show = (name) => {
    for (const pane of all) pane.hidden = pane.dataset.pane !== name;
    for (const button of buttons) button.setAttribute("aria-pressed", button.dataset.pane === name);
  };
  for (const button of buttons) button.addEventListener("click", () => show(button.dataset.pane));
  show(buttons[0].dataset.pane);
}
for (const button of document.querySelectorAll("button.view")) {
  button.addEventListener("click", () => {
    const {viewer, case: key, budget} = button.dataset; // other comparisons on the page may hold the same case
    document.getElementById(viewer)?.viewer.show(key, null, budget);
  });
}
