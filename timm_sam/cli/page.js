"use strict";
// Tables sort by a click on a column's name: upwards, downwards, and back to how they were written.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], written = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const compared = (a, b) => {
    if (a.dataset.key !== undefined && b.dataset.key !== undefined) return Number(a.dataset.key) - Number(b.dataset.key);
    if (a.dataset.key !== undefined || b.dataset.key !== undefined) return a.dataset.key !== undefined ? -1 : 1;
    return a.textContent.localeCompare(b.textContent, "en", {numeric: true});
  };
  heads.forEach((head, column) => {
    if (!head.textContent) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = {ascending: "descending", descending: undefined}, now = head.getAttribute("aria-sort");
      const order = now === null ? "ascending" : next[now];
      for (const other of heads) other.removeAttribute("aria-sort");
      if (order !== undefined) head.setAttribute("aria-sort", order);
      const sign = order === "descending" ? -1 : 1;
      const rows = order === undefined ? written : [...written].sort((one, two) => {
        const a = one.cells[column], b = two.cells[column];
        const lost = ("missing" in a.dataset) - ("missing" in b.dataset);  // what has no value is last either way
        return lost || sign * compared(a, b);
      });
      body.append(...rows);
    });
  });
}
// A number leads to the first run behind it; all of them are marked.
document.addEventListener("click", event => {
  const link = event.target.closest("td a");
  if (!link) return;
  for (const row of document.querySelectorAll("tr.lit")) row.classList.remove("lit");
  for (const anchor of (link.dataset.all ?? "").split(" ").filter(Boolean))
    document.getElementById(anchor)?.closest("tr").classList.add("lit");
});
