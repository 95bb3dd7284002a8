// The panel that translates speech: a file, or a recording made here.

import { request } from "./server.js";
import { dropTarget, element, onSubmit, seconds, table } from "./show.js";

const RATE = 16000;

export function speechPanel(section) {
  const input = section.querySelector("[name=audio]");
  const player = section.querySelector("audio");
  const button = section.querySelector("[name=record]");
  let audio = null;

  const take = (blob) => {
    audio = blob;
    URL.revokeObjectURL(player.src);
    player.src = URL.createObjectURL(blob);
    player.hidden = false;
  };
  dropTarget(input, take);

  let recorder = null;
  button.hidden = !navigator.mediaDevices; // browsers give the microphone to https and localhost only
  button.addEventListener("click", async () => {
    if (recorder) return recorder.stop();
    const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    const chunks = [];
    recorder = new MediaRecorder(stream);
    recorder.addEventListener("dataavailable", (event) => chunks.push(event.data));
    recorder.addEventListener("stop", async () => {
      stream.getTracks().forEach((track) => track.stop());
      recorder = null;
      button.setAttribute("aria-pressed", "false");
      button.textContent = "Record";
      take(await toWav(new Blob(chunks)));
    });
    recorder.start();
    button.setAttribute("aria-pressed", "true");
    button.textContent = "Stop";
  });

  onSubmit(section, async (form) => {
    if (!audio) throw new Error("Choose a file or record something first.");
    const model = new FormData(form).get("model");
    const path = `translate?model=${encodeURIComponent(model)}`;
    const result = await (await request(path, { method: "POST", body: audio })).json();
    const rows = result.pieces.map((piece) => [
      `${seconds(piece.start)} – ${seconds(piece.end)}`,
      piece.transcript,
      piece.text,
    ]);
    return [element("p", {}, result.text || "Nothing was heard."), table(["time", "heard", "translation"], rows)];
  });
}

/** What the browser recorded, as a mono WAV file that every server reads. */
async function toWav(blob) {
  const decoded = await new AudioContext().decodeAudioData(await blob.arrayBuffer());
  const offline = new OfflineAudioContext(1, Math.ceil(decoded.duration * RATE), RATE);
  const source = offline.createBufferSource();
  source.buffer = decoded;
  source.connect(offline.destination);
  source.start();
  const samples = (await offline.startRendering()).getChannelData(0);

  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (offset, word) => [...word].forEach((letter, i) => view.setUint8(offset + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); // size of the format block
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true); // bytes a second
  view.setUint16(32, 2, true); // bytes a frame
  view.setUint16(34, 16, true); // bits a sample
  text(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, i) => view.setInt16(44 + 2 * i, Math.round(32767 * Math.max(-1, Math.min(1, sample))), true));
  return new Blob([view], { type: "audio/wav" });
}
