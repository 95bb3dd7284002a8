// Requests to the server that sent this page, and its refusals as errors with a text for people.

const keyForm = document.querySelector("#key");
let key = sessionStorage.getItem("eagleray-key");

keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  key = new FormData(keyForm).get("key");
  sessionStorage.setItem("eagleray-key", key); // gone with the tab
  location.reload();
});

/** An answer with status 200; any other is thrown as an Error whose message is the server's. */
export async function request(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers }).catch(() => {
    throw new Error("The server cannot be reached.");
  });
  if (answer.ok) return answer;
  if (answer.status === 401) keyForm.hidden = false;
  const body = await answer.json().catch(() => null);
  const wait = answer.headers.get("Retry-After");
  const message = body?.error?.message ?? `The server answered with status ${answer.status}.`;
  throw new Error(wait ? `${message} Try again in ${wait} s.` : message);
}

/** Post a JSON body, get a JSON answer. */
export async function post(path, body) {
  const answer = await request(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  return answer.json();
}

/** The JSON objects of server-sent events, as they arrive. */
export async function* events(path, body) {
  const answer = await request(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const object = JSON.parse(data);
      if (object.error) throw new Error(object.error.message);
      yield object;
    }
  }
}
