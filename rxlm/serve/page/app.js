// The chat page. What is shown is what the server keeps: after every change it is asked again. Only
// choices of this browser (theme, options) are kept here, and the key until the tab is closed.
"use strict";

const at = (id) => document.getElementById(id);
const PAGE_SIZE = 50;
const RETRY_TEMPERATURE = 0.8; // A greedy answer would only be repeated.

const state = {
  sessions: [],
  session: null, // With its turns.
  loading: 0, // Number of the last load, so that a slow one does not overtake it.
  writing: null, // {sessionId, abort} while an answer is being written.
  retry: null, // What "Try again" does.
  ready: null, // Settled when the conversation that the address names was asked for.
};

// --- the server ---------------------------------------------------------------------------------

class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function call(method, path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server cannot be reached. Is it still running?");
  }
  if (answer.status === 401) {
    await askForKey();
    return call(method, path, body, signal);
  }
  if (!answer.ok) {
    let message = `The server answered with status ${answer.status}.`;
    try {
      message = (await answer.json()).error.message;
    } catch { /* No JSON: the status has to do. */ }
    throw new ServerError(answer.status, message.charAt(0).toUpperCase() + message.slice(1));
  }
  return answer;
}

async function json(method, path, body) {
  return (await call(method, path, body)).json();
}

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(0, "The connection was lost in the middle of the answer.");
    }
    if (piece.done) return;
    pending += piece.value;
    const events = pending.split("\n\n");
    pending = events.pop();
    for (const text of events) {
      const lines = text.split("\n");
      const data = lines.find((line) => line.startsWith("data: "))?.slice(6);
      if (data === undefined || data === "[DONE]") continue;
      yield [lines.find((line) => line.startsWith("event: "))?.slice(7), JSON.parse(data)];
    }
  }
}

const inSession = (id, rest = "") => `sessions/${encodeURIComponent(id)}${rest}`;

// --- small helpers ------------------------------------------------------------------------------

function make(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const percent = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
const nameOf = (session) => session.name || "Unnamed conversation";

function when(seconds) {
  const then = new Date(1000 * seconds);
  const minutes = (Date.now() - then) / 60000;
  if (minutes < 1) return "now";
  if (minutes < 60) return `${Math.floor(minutes)} min ago`;
  const today = then.toDateString() === new Date().toDateString();
  return today
    ? then.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })
    : then.toLocaleDateString([], { year: "numeric", month: "short", day: "numeric" });
}

function announce(text) {
  at("status").textContent = text;
}

function ask(id) {
  const dialog = at(id);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

let keyQuestion = null;
function askForKey() {
  keyQuestion ??= ask("key-dialog").then((given) => {
    keyQuestion = null;
    if (!given) throw new ServerError(401, "This server asks for a key.");
    sessionStorage.setItem("key", at("key").value.trim());
    at("key").value = "";
  });
  return keyQuestion;
}

function showProblem(error, retry) {
  if (error.name === "AbortError") return;
  at("problem-text").textContent = error.message;
  state.retry = retry;
  at("problem-retry").hidden = !retry;
  at("problem").hidden = false;
}

function hideProblem() {
  at("problem").hidden = true;
  state.retry = null;
}

// Does what a button says; what goes wrong is shown, with a way to do it again.
async function attempt(action) {
  hideProblem();
  try {
    await action();
  } catch (error) {
    showProblem(error, () => attempt(action));
  }
}

// --- the side bar -------------------------------------------------------------------------------

async function loadSessions(older = false) {
  const after = older && state.sessions.length ? `&after=${state.sessions.at(-1).id}` : "";
  const page = await json("GET", `sessions?limit=${PAGE_SIZE}${after}`);
  state.sessions = older ? [...state.sessions, ...page.data] : page.data;
  at("more").hidden = !page.has_more;
  showSessions();
}

function showSessions() {
  const items = state.sessions.map((session) => {
    const turns = `${session.num_turns} ${session.num_turns === 1 ? "turn" : "turns"}`;
    const button = make("button", { type: "button" },
      make("span", { className: "name", textContent: nameOf(session) }),
      make("span", { className: "when", textContent: `${when(session.used)}, ${turns}` }));
    if (session.id === state.session?.id) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => {
      closeMenu();
      go(session.id);
    });
    return make("li", {}, button);
  });
  if (!items.length) items.push(make("li", { className: "none", textContent: "None yet" }));
  at("sessions").replaceChildren(...items);
}

function openMenu() {
  at("sidebar").classList.add("open");
  at("menu").setAttribute("aria-expanded", "true");
  at("shade").hidden = false;
  at("new").focus();
}

function closeMenu() {
  at("sidebar").classList.remove("open");
  at("menu").setAttribute("aria-expanded", "false");
  at("shade").hidden = true;
}

// --- one conversation ---------------------------------------------------------------------------

function go(id) {
  const hash = id ? `#${id}` : "";
  if (location.hash === hash) return attempt(() => loadSession(id));
  location.hash = hash; // The rest happens when the address has changed.
  return Promise.resolve();
}

async function loadSession(id) {
  const number = ++state.loading;
  leaveAnswer();
  const session = id ? await json("GET", inSession(id)) : null;
  if (number !== state.loading) return;
  state.session = session;
  showSession();
  await loadMemory();
}

async function reload() {
  if (state.session) await loadSession(state.session.id);
  await loadSessions();
}

// The reader goes elsewhere; the server ends the answer and keeps what was said.
function leaveAnswer() {
  state.writing?.abort.abort();
  setWriting(null);
}

function showSession() {
  const session = state.session;
  at("title").textContent = session ? nameOf(session) : "New conversation";
  document.title = session ? `${nameOf(session)} - rxlm` : "rxlm";
  at("actions").hidden = !session;
  at("welcome").hidden = Boolean(session?.turns.length);
  at("system").hidden = !session?.system;
  at("system").querySelector("p").textContent = session?.system ?? "";
  at("turns").replaceChildren(...(session?.turns ?? []).map(shownTurn));
  showSessions();
  toEnd();
}

function shownTurn(turn, index, turns) {
  const shown = emptyTurn(turn.tool_use ?? turn.query);
  if (turn.think) showThoughts(shown, turn.think);
  shown.answer.append(markdown.render(turn.answer));
  if (turn.tool_call) showCall(shown, turn.tool_call);
  const facts = [];
  if (turn.reason === "stopped") facts.push("stopped");
  if (turn.reason === "length") facts.push("cut: the turn is full");
  facts.push(`${turn.answer_tokens} tokens`);
  if (turn.seconds) facts.push(`${Math.round(turn.answer_tokens / turn.seconds)} per second`);
  if (turn.write_size !== null) facts.push(`memory changed by ${percent(turn.write_size)}`);
  shown.below.append(make("span", { className: "facts", textContent: facts.join(" · ") }));
  if (index === turns.length - 1) {
    shown.below.append(
      action("Undo", "M5.5 4 2.5 7l3 3M3 7h6.5a3.5 3.5 0 0 1 0 7H7", () => undo(turn)),
      action("Retry", "M13 3.5v3.2H9.8M12.7 6.5A5.2 5.2 0 1 0 13.2 9", () => retry(turn)),
    );
  } else if (turn.has_state) {
    const icon = "M4 2.5v4c0 3 8 1 8 4.5v2.5M4 6v7.5";
    shown.below.append(action("Fork from here", icon, () => fork(turn.id)));
  }
  return shown.turn;
}

function emptyTurn(query) {
  const answer = make("div", { className: "answer" });
  const below = make("div", { className: "below" });
  const said = make("div", { className: "said" },
    make("p", {}, make("span", { className: "hidden", textContent: "You: " }), query));
  const turn = make("article", { className: "turn" }, said,
    make("span", { className: "hidden", textContent: "Answer: " }), answer, below);
  return { turn, answer, below };
}

function showThoughts(shown, text) {
  let box = shown.turn.querySelector(".thoughts");
  if (!box) {
    box = make("details", { className: "thoughts" },
      make("summary", { textContent: "Thinking" }), make("p"));
    shown.answer.before(box);
  }
  box.querySelector("p").textContent = text;
}

function showCall(shown, text) {
  shown.answer.after(make("p", { className: "call", textContent: `calls ${text}` }));
}

function action(name, path, act) {
  const icon = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  icon.setAttribute("viewBox", "0 0 16 16");
  icon.setAttribute("aria-hidden", "true");
  icon.append(document.createElementNS("http://www.w3.org/2000/svg", "path"));
  icon.firstChild.setAttribute("d", path);
  const button = make("button", { type: "button", className: "quiet" }, icon, name);
  button.addEventListener("click", () => attempt(act));
  return button;
}

function isAtEnd() {
  const box = at("scroll");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 80;
}

function toEnd() {
  at("scroll").scrollTop = at("scroll").scrollHeight;
}

// --- saying something ---------------------------------------------------------------------------

function setWriting(writing) {
  state.writing = writing;
  at("send").hidden = Boolean(writing);
  at("stop").hidden = !writing;
  for (const id of ["rename", "fork", "delete"]) at(id).disabled = Boolean(writing);
}

function options() {
  const kept = JSON.parse(localStorage.getItem("options") ?? "{}");
  return Object.fromEntries(Object.entries(kept).filter(([, value]) => value !== null));
}

async function begin(system, name) {
  const made = await json("POST", "sessions", { system: system || null, name: name || null });
  state.loading += 1;
  state.session = { ...made, turns: [] };
  history.replaceState(null, "", `#${made.id}`);
  showSession();
}

// Says something; `more` overrides how tokens are chosen.
async function say(query, more = {}) {
  await state.ready;
  hideProblem();
  setWriting({ abort: new AbortController() });
  const writing = state.writing;
  let shown = null;
  try {
    if (!state.session) await begin();
    const session = state.session;
    writing.sessionId = session.id;
    at("welcome").hidden = true;
    for (const button of at("turns").querySelectorAll("button")) button.disabled = true;
    shown = emptyTurn(query);
    shown.answer.classList.add("writing");
    shown.answer.setAttribute("aria-busy", "true");
    at("turns").append(shown.turn);
    toEnd();
    announce("Answering");
    const body = { query, ...options(), ...more };
    const path = inSession(session.id, "/turns");
    const answer = await call("POST", path, body, writing.abort.signal);
    const changed = await readAnswer(answer, shown);
    if (session.name === null) await nameAfter(session, query);
    if (state.writing !== writing) return;
    announce(changed === null ? "Answer complete" : `Answer complete. Memory changed by ${percent(changed)}`);
    setWriting(null);
    await reload();
  } catch (error) {
    if (state.writing !== writing) return; // Somebody went elsewhere.
    setWriting(null);
    // What was said may have been taken in or not: the server knows.
    const before = state.session?.turns.length ?? 0;
    await reload().catch(() => shown?.turn.remove());
    const isKept = (state.session?.turns.length ?? 0) > before;
    if (!isKept && !at("query").value) {
      at("query").value = query;
      fitComposer();
    }
    const again = () => {
      if (at("query").value === query) at("query").value = "";
      fitComposer();
      say(query, more);
    };
    showProblem(error, isKept ? null : again);
  }
}

async function readAnswer(answer, shown) {
  let text = "", thoughts = "", changed = null, isDrawn = true;
  const draw = () => {
    isDrawn = true;
    const follow = isAtEnd();
    if (thoughts) showThoughts(shown, thoughts);
    shown.answer.replaceChildren(markdown.render(text));
    if (follow) toEnd();
  };
  for await (const [kind, data] of eventsOf(answer)) {
    if (kind === "delta") text += data.text;
    else if (kind === "think") thoughts += data.text;
    else if (kind === "memory") changed = data.write_size;
    else if (kind === "end") {
      draw();
      shown.answer.classList.remove("writing");
      shown.answer.removeAttribute("aria-busy");
    } else if (kind === "error") throw new ServerError(500, data.error.message);
    if ((kind === "delta" || kind === "think") && isDrawn) {
      isDrawn = false;
      requestAnimationFrame(() => !isDrawn && draw());
    }
  }
  return changed;
}

async function nameAfter(session, query) {
  const line = query.trim().split("\n", 1)[0];
  const name = line.length > 48 ? `${line.slice(0, 47).trimEnd()}…` : line;
  await json("PATCH", inSession(session.id), { name });
  session.name = name;
}

async function stop() {
  const writing = state.writing;
  if (!writing) return;
  if (!writing.sessionId) return leaveAnswer();
  announce("Stopping");
  await json("POST", inSession(writing.sessionId, "/stop"));
}

// --- changing a conversation --------------------------------------------------------------------

async function undo(turn) {
  await json("POST", inSession(state.session.id, "/undo"), {});
  if (!at("query").value) at("query").value = turn.query;
  announce("The last turn is forgotten; its text is in the message field");
  await reload();
  fitComposer();
  at("query").focus();
}

async function retry(turn) {
  await json("POST", inSession(state.session.id, "/undo"), {});
  state.session.turns.pop();
  at("turns").lastChild.remove();
  const seed = crypto.getRandomValues(new Uint32Array(1))[0];
  await say(turn.query, { temperature: options().temperature || RETRY_TEMPERATURE, seed });
}

async function fork(turnId) {
  const name = `${nameOf(state.session)} (fork)`.slice(0, 200);
  const body = { name, at_turn: turnId ?? null };
  const made = await json("POST", inSession(state.session.id, "/fork"), body);
  await loadSessions();
  announce(`Forked: this is now ${name}`);
  await go(made.id);
}

async function rename() {
  at("rename-name").value = state.session.name ?? "";
  if (!await ask("rename-dialog")) return;
  const name = at("rename-name").value.trim();
  if (!name) return;
  await json("PATCH", inSession(state.session.id), { name });
  await reload();
}

async function remove() {
  const { id } = state.session;
  if (!await ask("delete-dialog")) return;
  await json("DELETE", inSession(id));
  announce("The conversation is deleted");
  await loadSessions();
  await go(null);
  at("query").focus();
}

async function startNew() {
  at("new-name").value = "";
  at("new-system").value = "";
  if (!await ask("new-dialog")) return;
  closeMenu();
  leaveAnswer();
  const [system, name] = [at("new-system").value.trim(), at("new-name").value.trim()];
  if (system || name) {
    await begin(system, name);
    await Promise.all([loadSessions(), loadMemory()]);
  } else await go(null);
  at("query").focus();
}

async function download() {
  const answer = await call("GET", inSession(state.session.id, "/export"));
  const address = URL.createObjectURL(await answer.blob());
  make("a", { href: address, download: `${state.session.id}.zip` }).click();
  URL.revokeObjectURL(address);
}

// --- memory -------------------------------------------------------------------------------------

let memoryView = null;

async function loadMemory() {
  const session = state.session;
  memoryView = session ? await json("GET", inSession(session.id, "/memory")) : null;
  if (session === state.session) showMemory();
}

function showMemory() {
  const view = memoryView;
  const turns = state.session?.turns ?? [];
  const isWritten = Boolean(view?.turn);
  for (const id of ["heat-figure", "memory-details"]) at(id).hidden = !isWritten;
  const sizes = turns.map((turn) => turn.write_size).filter((size) => size !== null);
  at("bars-figure").hidden = sizes.length < 2;
  const bytes = state.session?.state_bytes;
  at("memory-size").textContent = view
    ? `${view.num_layers} layers × ${view.num_slots} slots`
      + (bytes ? `, ${bytes.toLocaleString("en")} bytes` : "") + ", after one turn or a thousand."
    : "";
  if (!isWritten) {
    at("memory-text").textContent = state.session?.system
      ? "Only the system prompt was written yet." : "Nothing was written yet.";
    return;
  }
  const cells = view.changes.flatMap((layer, row) => layer.map((change, slot) => ({ change, row, slot })));
  cells.sort((a, b) => b.change - a.change);
  const most = cells[0];
  at("memory-text").textContent = `The last turn changed the memory by ${percent(view.write_size)}, `
    + `most in layer ${most.row + 1}, slot ${most.slot + 1} (${percent(most.change)}).`;
  drawHeat(view, most.change);
  if (sizes.length > 1) drawBars(sizes);
  at("memory-rows").replaceChildren(...view.changes.map((layer, row) => {
    const mean = layer.reduce((sum, value) => sum + value, 0) / layer.length;
    const order = [...layer.keys()].sort((a, b) => layer[b] - layer[a]).slice(0, 3);
    return make("tr", {}, make("td", { textContent: row + 1 }), make("td", { textContent: percent(mean) }),
      make("td", { textContent: percent(layer[order[0]]) }),
      make("td", { textContent: order.map((slot) => slot + 1).join(", ") }));
  }));
}

function colours(canvas) {
  const style = getComputedStyle(canvas);
  return [style.backgroundColor, style.color];
}

// Rows of equal length if the slots can be divided so, in about the shape of the panel.
function heatShape(view) {
  const { num_slots: slots, num_layers: layers } = view;
  const wanted = Math.max(16, Math.ceil(Math.sqrt(1.5 * layers * slots)));
  let columns = Math.min(slots, wanted);
  while (columns > wanted / 2 && slots % columns) columns -= 1;
  if (slots % columns) columns = Math.min(slots, wanted);
  return { columns, rows: Math.ceil(slots / columns) };
}

function prepare(canvas, height) {
  const width = canvas.clientWidth || 256;
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return { context, width };
}

function drawHeat(view, most) {
  const canvas = at("heat");
  const { columns, rows } = heatShape(view);
  const gap = 6, left = 16, size = ((canvas.clientWidth || 256) - left) / columns;
  const height = view.num_layers * rows * size + (view.num_layers - 1) * gap;
  const { context } = prepare(canvas, height);
  const [, colour] = colours(canvas);
  const [untouched] = colours(at("scale"));
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "top";
  const space = size > 5 ? 1 : 0.4;
  view.changes.forEach((_, row) => {
    context.fillStyle = getComputedStyle(at("scale-most")).color;
    context.fillText(row + 1, 0, row * (rows * size + gap) + 2);
  });
  view.changes.forEach((layer, row) => layer.forEach((change, slot) => {
    const x = left + (slot % columns) * size;
    const y = row * (rows * size + gap) + Math.floor(slot / columns) * size;
    const cell = [x, y, size - space, size - space];
    context.globalAlpha = 1;
    context.fillStyle = untouched;
    context.fillRect(...cell);
    context.globalAlpha = most > 0 ? change / most : 0;
    context.fillStyle = colour;
    context.fillRect(...cell);
  }));
  canvas.setAttribute("aria-label",
    `Heat map of ${view.num_layers} layers times ${view.num_slots} slots. ${at("memory-text").textContent}`);
  canvas.onpointermove = (event) => {
    const step = rows * size + gap;
    const row = Math.floor(event.offsetY / step);
    const column = Math.floor((event.offsetX - left) / size);
    const slot = Math.floor((event.offsetY % step) / size) * columns + column;
    const change = view.changes[row]?.[slot];
    const isCell = change !== undefined && column >= 0 && column < columns;
    at("heat-point").textContent = !isCell ? ""
      : `Layer ${row + 1}, slot ${slot + 1}: changed by ${percent(change)}`;
  };
  canvas.onpointerleave = () => { at("heat-point").textContent = ""; };
  drawScale(untouched, colour);
  at("scale-most").textContent = percent(most);
}

function drawScale(untouched, colour) {
  const canvas = at("scale"), context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  const fade = context.createLinearGradient(0, 0, canvas.width, 0);
  fade.addColorStop(0, untouched);
  fade.addColorStop(1, colour);
  context.fillStyle = fade;
  context.fillRect(0, 0, canvas.width, canvas.height);
}

function drawBars(sizes) {
  const canvas = at("bars"), height = 54, shown = sizes.slice(-48);
  const { context, width } = prepare(canvas, height);
  const most = Math.max(...shown), step = Math.min(18, width / shown.length);
  context.fillStyle = colours(canvas)[1];
  shown.forEach((size, index) => {
    const bar = Math.max(2, most > 0 ? (height - 2) * size / most : 0);
    context.globalAlpha = index === shown.length - 1 ? 1 : 0.45;
    context.fillRect(index * step, height - bar, step - Math.min(3, step / 4), bar);
  });
  const list = shown.map(percent).join(", ");
  canvas.setAttribute("aria-label", `Bars, one a turn, the last ${shown.length}: ${list}.`);
}

function toggleMemory(isShown) {
  document.querySelector(".shell").classList.toggle("no-memory", !isShown);
  at("memory-toggle").setAttribute("aria-expanded", String(isShown));
  if (isShown) showMemory();
}

// --- choices of this browser --------------------------------------------------------------------

const isNarrow = matchMedia("(max-width: 1080px)"); // The memory lies over the conversation then.
const THEMES = { auto: "System", light: "Light", dark: "Dark" };

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  at("theme-name").textContent = THEMES[theme];
  localStorage.setItem("theme", theme);
  if (memoryView) showMemory();
}

function nextTheme() {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(localStorage.getItem("theme") ?? "auto") + 1) % names.length]);
}

async function chooseOptions() {
  const now = options();
  at("option-temperature").value = now.temperature ?? "";
  at("option-tokens").value = now.max_tokens ?? "";
  if (!await ask("options-dialog")) return;
  const number = (id) => (at(id).value === "" ? null : Number(at(id).value));
  const kept = { temperature: number("option-temperature"), max_tokens: number("option-tokens") };
  localStorage.setItem("options", JSON.stringify(kept));
}

function fitComposer() {
  const field = at("query");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

// --- wiring -------------------------------------------------------------------------------------

function onSubmit(event) {
  event.preventDefault();
  const query = at("query").value.trim();
  if (!query || state.writing) return;
  at("query").value = "";
  fitComposer();
  say(query);
}

function onKey(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === at("query")) {
    event.preventDefault();
    at("composer").requestSubmit();
  } else if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (state.writing) attempt(stop);
    else if (at("sidebar").classList.contains("open")) {
      closeMenu();
      at("menu").focus();
    } else if (isNarrow.matches && at("memory-toggle").getAttribute("aria-expanded") === "true") {
      toggleMemory(false);
      at("memory-toggle").focus();
    }
  }
}

function wire() {
  const clicks = {
    skip: (event) => {
      event.preventDefault(); // The address names the conversation.
      at("query").focus();
    },
    new: () => attempt(startNew),
    more: () => attempt(() => loadSessions(true)),
    rename: () => attempt(rename),
    fork: () => attempt(() => fork(null)),
    delete: () => attempt(remove),
    export: (event) => {
      event.preventDefault();
      attempt(download);
    },
    stop: () => attempt(stop),
    theme: nextTheme,
    options: () => attempt(chooseOptions),
    menu: openMenu,
    shade: closeMenu,
    "memory-toggle": () => toggleMemory(document.querySelector(".shell").classList.contains("no-memory")),
    "memory-close": () => toggleMemory(false),
    "problem-close": hideProblem,
    "problem-retry": () => state.retry?.(),
  };
  for (const [id, act] of Object.entries(clicks)) at(id).addEventListener("click", act);
  for (const button of document.querySelectorAll(".cancel")) {
    button.addEventListener("click", () => button.closest("dialog").close(""));
  }
  at("composer").addEventListener("submit", onSubmit);
  at("query").addEventListener("input", fitComposer);
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", () => attempt(() => loadSession(location.hash.slice(1))));
  window.addEventListener("focus", () => !state.writing && loadSessions().catch(() => {}));
  isNarrow.addEventListener("change", () => toggleMemory(!isNarrow.matches));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => memoryView && showMemory());
  new ResizeObserver(() => memoryView && showMemory()).observe(at("memory"));
}

async function start() {
  const model = (await json("GET", "v1/models")).data[0];
  at("model").textContent = model.id;
  await loadSessions();
  const id = location.hash.slice(1);
  try {
    await loadSession(id);
  } catch (error) {
    if (error.status !== 404) throw error;
    history.replaceState(null, "", location.pathname);
    await loadSession(null);
    showProblem(new Error("That conversation is not here (any more)."), null);
  }
}

wire();
setTheme(localStorage.getItem("theme") ?? "auto");
toggleMemory(!isNarrow.matches);
state.ready = attempt(start);
