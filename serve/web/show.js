// Building blocks of results. Texts enter the page as text nodes only, never as markup.

/** An element with attributes and children (elements or texts). */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A table; cells are texts or elements, numbers stand to the right. */
export function table(head, rows) {
  const cell = (value) =>
    typeof value === "number" || value === null
      ? element("td", { class: "number" }, value === null ? "–" : digits(value))
      : element("td", {}, value);
  return element(
    "table",
    {},
    element("thead", {}, element("tr", {}, ...head.map((text) => element("th", { scope: "col" }, text)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell)))),
  );
}

/** A bar from 0 to 1 with its value in words for those who do not see it. */
export function bar(value, label) {
  return element("meter", { min: 0, max: 1, value, "aria-label": `${label}: ${digits(value)}` });
}

export function digits(value) {
  return Number.isInteger(value) ? String(value) : value.toFixed(3);
}

export function seconds(value) {
  return `${Math.floor(value / 60)}:${(value % 60).toFixed(1).padStart(4, "0")}`;
}

/** Run the work of a form at each submit: button off meanwhile, result or error below. */
export function onSubmit(section, work) {
  const form = section.querySelector("form");
  const output = section.querySelector("output");
  const button = form.querySelector("button:not([type=button])");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    output.replaceChildren();
    try {
      output.replaceChildren(...((await work(form)) ?? []));
    } catch (error) {
      output.replaceChildren(element("p", { class: "error", role: "alert" }, error.message));
    } finally {
      button.disabled = false;
    }
  });
}

/** A field set whose text areas can be added and taken away; `texts` reads them. */
export function answersOf(section) {
  const box = section.querySelector(".answers");
  const least = Number(box.dataset.least);
  const add = element("button", { type: "button" }, "Another answer");
  const rows = () => [...box.querySelectorAll(".answer")];
  const name = () =>
    rows().forEach((row, index) => {
      row.querySelector("span").textContent = `Answer ${index + 1}`;
      row.querySelector("button").hidden = rows().length <= least;
    });
  const addRow = () => {
    const remove = element("button", { type: "button" }, "Remove");
    const area = element("textarea", { rows: 2, required: "" });
    const row = element("div", { class: "answer" }, element("label", {}, element("span"), area), remove);
    remove.addEventListener("click", () => (row.remove(), name()));
    add.before(row);
    name();
    return area;
  };
  box.append(element("p", {}, add));
  add.addEventListener("click", () => addRow().focus());
  for (let count = 0; count < Math.max(2, least); count++) addRow();
  return () => rows().map((row) => row.querySelector("textarea").value);
}

/** Let a file be dropped on the label of a file field; `taken` is called with each new file. */
export function dropTarget(input, taken) {
  const label = input.closest("label");
  const over = (on) => (event) => {
    event.preventDefault();
    label.classList.toggle("over", on);
  };
  label.addEventListener("dragover", over(true));
  label.addEventListener("dragleave", over(false));
  label.addEventListener("drop", (event) => {
    over(false)(event);
    if (!event.dataTransfer.files.length) return;
    input.files = event.dataTransfer.files;
    taken(input.files[0]);
  });
  input.addEventListener("change", () => input.files.length && taken(input.files[0]));
}
