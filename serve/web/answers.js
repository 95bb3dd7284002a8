// The panels that judge answers: compare, rank, and score with a picture.

import { post, request } from "./server.js";
import { answersOf, bar, dropTarget, element, onSubmit, table } from "./show.js";

export function comparePanel(section) {
  onSubmit(section, async (form) => {
    const body = Object.fromEntries(new FormData(form));
    const result = await post("compare", body);
    const better = result.p_a > 0.5 ? "A" : "B";
    const verdict = result.consistent
      ? `Answer ${better} is better.`
      : "Undecided: the verdict changes with the order in which the answers are read.";
    const rows = [
      ["both orders together", result.p_a],
      ["A read first", result.p_order1],
      ["B read first", result.p_order2],
    ];
    return [
      element("p", {}, verdict),
      table(["", "A is better", "", "B is better"], rows.map(([name, p]) => [name, p, bar(p, name), 1 - p])),
    ];
  });
}

export function rankPanel(section) {
  const texts = answersOf(section);
  onSubmit(section, async (form) => {
    const responses = texts();
    const { model, prompt, method } = Object.fromEntries(new FormData(form));
    const result = await post("rank", { model, prompt, responses, method });
    const rows = result.order.map((index, place) => [
      place + 1,
      `Answer ${index + 1}`,
      responses[index],
      result.scores ? result.scores[index] : null,
    ]);
    const note = result.intransitive ? " They run in a circle, so the order is not the only one." : "";
    return [
      table(["place", "answer", "text", "score"], rows),
      element("p", { class: "note" }, `${result.comparisons} comparisons.${note}`),
    ];
  });
}

export function picturePanel(section) {
  const texts = answersOf(section);
  const input = section.querySelector("[name=image]");
  const preview = section.querySelector("img");
  dropTarget(input, (file) => {
    URL.revokeObjectURL(preview.src);
    preview.src = URL.createObjectURL(file);
    preview.hidden = false;
  });
  onSubmit(section, async (form) => {
    const responses = texts();
    const body = new FormData(form);
    if (!input.files.length) body.delete("image"); // an empty file field is sent as a file of no bytes
    responses.forEach((response) => body.append("responses", response));
    const result = await (await request("score", { method: "POST", body })).json();
    const order = result.scores.map((_, index) => index).sort((i, j) => result.scores[j] - result.scores[i]);
    return [
      table(["answer", "reward"], order.map((index) => [responses[index], result.scores[index]])),
      element("p", { class: "note" }, "Only differences between answers to one prompt mean something."),
    ];
  });
}
