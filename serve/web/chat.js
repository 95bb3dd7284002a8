// The chat: one message to two models at the same time, with the speed of each.

import { events } from "./server.js";
import { element, onSubmit } from "./show.js";

export function chatPanel(section) {
  const logs = [...section.querySelectorAll(".talk")];
  let talks = [[], []];

  section.querySelector("[name=clear]").addEventListener("click", () => {
    talks = [[], []];
    logs.forEach((log) => log.replaceChildren());
  });

  onSubmit(section, async (form) => {
    const fields = Object.fromEntries(new FormData(form));
    form.message.value = "";
    const settings = { temperature: Number(fields.temperature), max_tokens: Number(fields.max_tokens) };
    await Promise.all([fields.model, fields.other].map((model, side) =>
      answer({ model, ...settings }, fields.message, talks[side], logs[side])));
  });
}

async function answer(settings, message, talk, log) {
  const say = (role, text) => {
    const line = element("p", { class: role }, text);
    log.append(line);
    log.scrollTop = log.scrollHeight;
    return line;
  };
  say("user", message);
  talk.push({ role: "user", content: message });
  const line = say("assistant", "");
  const body = { ...settings, messages: talk, stream: true, stream_options: { include_usage: true } };
  const begin = performance.now();
  try {
    for await (const chunk of events("v1/chat/completions", body)) {
      line.append(chunk.choices[0]?.delta?.content ?? "");
      log.scrollTop = log.scrollHeight;
      if (chunk.usage) {
        const tokens = chunk.usage.completion_tokens;
        const speed = (tokens / (performance.now() - begin)) * 1000;
        say("note", `${tokens} tokens, ${speed.toFixed(1)} tokens/s`);
      }
    }
    talk.push({ role: "assistant", content: line.textContent });
  } catch (error) {
    talk.pop(); // the message was not answered, so the next one does not build on it
    say("error", error.message);
  }
}
