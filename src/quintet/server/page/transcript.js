// The messages of the conversation that is shown, and what can be done with each.

const state = { models: [], conversations: [], current: null, running: new Map() };
const views = new Map(); // of the messages shown, by their ids

/** Show the current conversation from its first message to its last. */
function showConversation() {
  const conversation = state.current;
  const messages = branch(conversation);
  views.clear();
  $("transcript").replaceChildren(...messages.map(viewOf));
  $("empty").hidden = messages.length > 0;
  $("title").textContent = conversation.title;
  document.title = messages.length ? `${conversation.title} – Quintet` : "Quintet";
  $("menu").hidden = !messages.length;
  showModel();
  showState();
}

/** What depends on whether an answer is being made: the button, and how full the context is. */
function showState() {
  const running = state.running.has(state.current.id);
  setIcon($("go"), running ? "stop" : "send");
  $("go").setAttribute("aria-label", running ? "Stop" : "Send");
  $("go").disabled = !running && !$("box").value.trim();
  const used = branch(state.current).findLast((message) => message.figures)?.figures.total;
  const { context } = currentModel();
  $("used").hidden = !used || !context;
  if (!used || !context) return;
  $("meter").value = Math.min(used / context, 1);
  $("used-text").textContent = `${used.toLocaleString("en")} of ${context.toLocaleString("en")} tokens`;
}

function viewOf(message) {
  const isUser = message.role === "user";
  const view = {
    status: make("p", { class: "status" }),
    actions: make("div", { class: "actions", role: "group", "aria-label": isUser ? "Your message" : "This answer" }),
    body: make("div", { class: isUser ? "bubble" : "text", dir: "auto" }),
  };
  const heading = make("h2", { class: "unseen" }, isUser ? "You" : "Answer");
  view.element = make("article", { class: `message ${message.role}`, "data-id": message.id }, heading);
  if (isUser) view.body.append(message.content);
  else {
    view.summary = make("summary", {}, "");
    view.thought = document.createTextNode("");
    view.reasoning = make("details", { class: "reasoning", hidden: true }, view.summary, make("div", { dir: "auto" }, view.thought));
    view.failure = make("div", { class: "failure", hidden: true });
    view.element.append(view.reasoning);
  }
  view.element.append(view.body, ...(isUser ? [] : [view.failure, view.status]), view.actions);
  views.set(message.id, view);
  showMessage(message);
  return view.element;
}

/** Show a message as it is by now. */
function showMessage(message) {
  const view = views.get(message.id);
  if (!view) return;
  const run = state.running.get(state.current.id);
  const running = run?.reply === message ? run : null;
  if (message.role === "assistant") {
    view.element.setAttribute("aria-busy", String(running !== null));
    showMarkdown(view.body, message.content);
    showReasoning(view, message, running);
    showFailure(view, message);
    view.status.textContent = running ? progress(running) : figures(message);
    view.status.classList.toggle("busy", running !== null);
  }
  // Buttons that stay are not made anew: one of them may have the focus.
  if (running && view.actions.childElementCount) view.actions.replaceChildren();
  if (!running && !view.actions.childElementCount) view.actions.append(...actionsOf(message));
}

function showReasoning(view, message, running) {
  const text = message.reasoning ?? "";
  view.reasoning.hidden = !text;
  if (text.length > view.thought.length) view.thought.appendData(text.slice(view.thought.length));
  else if (text.length < view.thought.length) view.thought.data = text;
  const seconds = message.thought;
  const over = !running || message.content;
  view.summary.textContent = over ? (seconds ? `Thought for ${seconds.toFixed(1)} s` : "Thoughts") : "Thinking";
  view.reasoning.classList.toggle("busy", !over);
}

function showFailure(view, message) {
  if (view.failure.hidden === !message.error) return;
  view.failure.hidden = !message.error;
  view.failure.replaceChildren();
  if (!message.error) return;
  view.failure.setAttribute("role", "alert");
  view.failure.append(make("p", {}, message.error));
  if (message.again) view.failure.append(make("button", { type: "button", click: () => answerAgain(message) }, "Try again"));
}

/** What goes on while nothing is there yet, and how fast it comes afterwards. */
function progress(run) {
  const seconds = (performance.now() - run.since) / 1000;
  const lasts = seconds >= 1 ? `, ${Math.floor(seconds)} s` : "";
  if (run.phase === "waiting") return `Waiting for the server${lasts}`;
  if (run.phase === "reading") return `Reading the conversation${lasts}`;
  const speed = seconds > 0.5 ? `, ${(run.pieces / seconds).toFixed(1)} a second` : "";
  return `About ${counted(run.pieces, "token")}${speed}`;
}

/** What an answer came to. */
function figures({ figures: made, ended, model }) {
  const parts = [];
  if (ended === "stopped") parts.push("Stopped");
  if (ended === "length") parts.push("Cut at its greatest length");
  if (made) {
    parts.push(counted(made.tokens, "token"));
    if (made.tokens > 1 && made.seconds > 0) parts.push(`${((made.tokens - 1) / made.seconds).toFixed(1)} tokens/s`);
    if (made.first >= 1) parts.push(`${made.first.toFixed(1)} s to the first`);
    if (made.cached) parts.push(`${made.cached.toLocaleString("en")} of ${made.prompt.toLocaleString("en")} read before`);
  }
  if (model && state.models.length > 1) parts.push(model);
  return parts.join(" · ");
}

function actionsOf(message) {
  const buttons = [];
  const siblings = childrenOf(state.current, message.parent).filter((each) => each.role === message.role);
  if (siblings.length > 1) buttons.push(branchControl(message, siblings));
  if (message.content) buttons.push(copyButton("Copy", () => message.content));
  if (message.role === "user") buttons.push(iconButton("edit", "Edit", () => editMessage(message)));
  else buttons.push(iconButton("again", "Answer again", () => answerAgain(message)));
  if (message.ended === "length" && message.content && message.id === state.current.leaf) {
    buttons.push(make("button", { type: "button", class: "quiet", click: () => goOn(message) }, "Go on"));
  }
  return buttons;
}

/** Which of the messages at this place is shown, and the ways to the others. */
function branchControl(message, siblings) {
  const at = siblings.indexOf(message);
  const step = (by, name, label) => {
    const button = iconButton(name, label, () => {
      const next = siblings[at + by];
      showBranch(state.current, next);
      keep(state.current);
      showConversation();
      const control = views.get(next.id).element.querySelector(".branches");
      (control.querySelector(`[aria-label="${label}"]:not(:disabled)`) ?? control.querySelector("button:not(:disabled)")).focus();
    });
    button.disabled = !siblings[at + by] || state.running.has(state.current.id);
    return button;
  };
  const place = make("span", {}, `${at + 1} of ${siblings.length}`);
  return make("span", { class: "branches" }, step(-1, "back", "The version before"), place, step(1, "on", "The next version"));
}

/** Put a box in a message's place; what is sent from it begins a branch. */
function editMessage(message) {
  const view = views.get(message.id);
  if (!view || state.running.has(state.current.id)) return;
  const box = make("textarea", { rows: 2, "aria-label": "Edit the message", dir: "auto" });
  box.value = message.content;
  const stop = () => {
    view.element.classList.remove("editing");
    editor.replaceWith(view.body, view.actions);
    view.actions.querySelector('[aria-label="Edit"]')?.focus();
  };
  const send = () => {
    if (box.value.trim()) resend(message, box.value.trim());
  };
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      stop();
    } else if (sends(event)) {
      event.preventDefault();
      send();
    }
  });
  const editor = make(
    "div",
    { class: "editor" },
    box,
    make("div", { class: "actions" }, make("button", { type: "button", class: "quiet", click: stop }, "Cancel"), make("button", { type: "button", class: "strong", click: send }, "Send")),
  );
  view.element.classList.add("editing");
  view.actions.remove();
  view.body.replaceWith(editor);
  box.focus();
  box.setSelectionRange(box.value.length, box.value.length);
}

// -- scrolling ----------------------------------------------------------------------------------

function atEnd() {
  const scroll = $("scroll");
  return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
}

function toEnd() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

/** Change what is shown, and stay at its end if that is where one was. */
function following(change) {
  const follows = atEnd();
  change();
  if (follows) toEnd();
  $("latest").hidden = atEnd();
}
