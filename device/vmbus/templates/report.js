"use strict";
// Conveniences only: the page says everything without them.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const value = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.v ?? cell.textContent.trim();
    const number = Number(text.replaceAll(",", ""));
    return text !== "" && Number.isFinite(number) ? number : text;
  };
  table.classList.add("live");
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.tabIndex = 0;
    const sort = () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keyed = [...body.rows].map((row) => [value(row, column), row]);
      keyed.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === ""); // what is not known comes last
        const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
        return down ? -order : order;
      });
      body.append(...keyed.map(([, row]) => row));
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); }
    });
  });
}
const filter = document.getElementById("filter");
if (filter) {
  const rows = [...document.getElementById("table").tBodies[0].rows];
  const texts = rows.map((row) => ("episode " + row.textContent).toLowerCase());
  const shown = document.getElementById("shown");
  const apply = () => {
    const words = filter.value.toLowerCase().match(/episode \d+|\S+/g) ?? [];
    let count = 0;
    rows.forEach((row, place) => {
      const fits = words.every((word) => word.startsWith("episode ")
        ? row.cells[0].textContent === word.slice(8) : texts[place].includes(word));
      row.hidden = !fits;
      count += fits;
    });
    shown.textContent = words.length ? `${count.toLocaleString("en")} of ${rows.length.toLocaleString("en")} operations` : "";
  };
  filter.form.hidden = false;
  filter.form.addEventListener("submit", (event) => event.preventDefault());
  filter.addEventListener("input", apply);
  apply();
}
for (const block of document.querySelectorAll("pre.command")) {
  const command = block.textContent;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(command);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(block.querySelector("code"));
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  block.append(button);
}
