// The page: which panel is shown, which models there are, and which of them serve the endpoint of a panel.

import { comparePanel, picturePanel, rankPanel } from "./answers.js";
import { chatPanel } from "./chat.js";
import { request } from "./server.js";
import { element } from "./show.js";
import { speechPanel } from "./speech.js";

const PANELS = {
  compare: { endpoint: "/compare", start: comparePanel },
  rank: { endpoint: "/rank", start: rankPanel },
  picture: { endpoint: "/score", start: picturePanel },
  speech: { endpoint: "/translate", start: speechPanel },
  chat: { endpoint: "/v1/chat/completions", kind: "lisa", start: chatPanel }, // a judge answers with a verdict only
};

const sections = [...document.querySelectorAll("main > section")];
const links = [...document.querySelectorAll("nav a")];

function show() {
  const wanted = sections.find((section) => `#${section.id}` === location.hash) ?? sections[0];
  sections.forEach((section) => (section.hidden = section !== wanted));
  links.forEach((link) =>
    link.hash === `#${wanted.id}` ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current"));
}

async function loadModels() {
  const body = document.querySelector("#models tbody");
  let models;
  try {
    models = (await (await request("v1/models")).json()).data;
  } catch (error) {
    body.replaceChildren(element("tr", {}, element("td", { colspan: 4, class: "error" }, error.message)));
    return;
  }
  body.replaceChildren(...models.map((model) =>
    element("tr", {}, ...[model.id, model.kind, model.endpoints.join(", "), model.revision].map((text) =>
      element("td", {}, text)))));
  for (const [name, { endpoint, kind }] of Object.entries(PANELS)) {
    const mine = models.filter((model) => model.endpoints.includes(endpoint) && (kind ?? model.kind) === model.kind);
    for (const select of document.querySelectorAll(`#${name} select[name=model], #${name} select[name=other]`)) {
      const chosen = select.value;
      select.replaceChildren(...mine.map((model) => element("option", {}, model.id)));
      if (mine.some((model) => model.id === chosen)) select.value = chosen;
      else if (select.name === "other") select.selectedIndex = mine.length - 1;
    }
    const button = document.querySelector(`#${name} button:not([type=button])`);
    if (!mine.length) button.title = `No model here serves ${endpoint}.`;
    button.disabled = !mine.length;
    const link = links.find((link) => link.hash === `#${name}`);
    mine.length ? link.removeAttribute("aria-disabled") : link.setAttribute("aria-disabled", "true");
  }
}

for (const [name, { start }] of Object.entries(PANELS)) start(document.getElementById(name));
addEventListener("hashchange", () => (show(), loadModels()));
show();
loadModels();
