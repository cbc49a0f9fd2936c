// The messages of the conversation that is shown, and what can be done with each.

// As the server describes them.
let models = [];
// All conversations, the latest first.
let talks = [];
// The one that is shown.
let current = null;
// Answers being made, by the ids of their conversations.
const runs = new Map();
// Of the messages shown, by their ids.
const views = new Map();

/** Show the current conversation from its first message to its last. */
function showConversation() {
  const messages = branch(current);
  views.clear();
  $("transcript").replaceChildren(...messages.map(viewOf));
  $("empty").hidden = messages.length > 0;
  $("title").textContent = current.title;
  document.title = messages.length ? `${current.title} – Quintet` : "Quintet";
  $("menu").hidden = !messages.length;
  showModel();
  showState();
}

/** What depends on whether an answer is being made: the button, and how full the context is. */
function showState() {
  const running = runs.has(current.id);
  setIcon($("go"), running ? "stop" : "send");
  $("go").setAttribute("aria-label", running ? "Stop" : "Send");
  $("go").disabled = !running && !$("box").value.trim();
  const used = branch(current).findLast((message) => message.figures)?.figures.total;
  const { context } = modelOf(current);
  $("used").hidden = !used || !context;
  if (!used || !context) return;
  $("meter").value = Math.min(used / context, 1);
  $("used-text").textContent = `${number(used)} of ${number(context)} tokens`;
}

function viewOf(message) {
  const isUser = message.role === "user";
  const view = {
    status: make("p", { class: "status" }),
    actions: make("div", { class: "actions" }),
    body: make("div", { class: isUser ? "bubble" : "text", dir: "auto" }),
  };
  const heading = make("h2", { class: "unseen" }, isUser ? "You" : "Answer");
  view.element = make("article", { class: `message ${message.role}`, "data-id": message.id }, heading);
  if (isUser) view.body.append(message.content);
  else {
    view.summary = make("summary", {}, "");
    view.thought = document.createTextNode("");
    const thoughts = make("div", { dir: "auto" }, view.thought);
    view.reasoning = make("details", { class: "reasoning" }, view.summary, thoughts);
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
  const run = runs.get(current.id);
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
  // Only ever more: what is there is not laid out again.
  view.thought.appendData(text.slice(view.thought.length));
  const over = !running || message.content;
  const lasted = message.thought ? `Thought for ${message.thought.toFixed(1)} s` : "Thoughts";
  view.summary.textContent = over ? lasted : "Thinking";
  view.reasoning.classList.toggle("busy", !over);
}

function showFailure(view, message) {
  if (view.failure.hidden === !message.error) return;
  view.failure.hidden = !message.error;
  view.failure.replaceChildren();
  if (!message.error) return;
  view.failure.setAttribute("role", "alert");
  view.failure.append(make("p", {}, message.error));
  if (message.again) view.failure.append(button("Try again", () => answerAgain(message)));
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
function figures({ figures: made, ended, about, model, warnings }) {
  const parts = [];
  if (ended === "stopped") parts.push("Stopped");
  if (about) parts.push(`about ${counted(about, "token")}`);
  if (ended === "length") parts.push("Cut at its greatest length");
  if (made) {
    parts.push(counted(made.tokens, "token"));
    if (made.speed) parts.push(`${made.speed.toFixed(1)} tokens/s`);
    if (made.first >= 1) parts.push(`${made.first.toFixed(1)} s to the first`);
    if (made.cached) parts.push(`${number(made.cached)} of ${number(made.prompt)} read before`);
  }
  if (model && models.length > 1) parts.push(model);
  if (warnings) parts.push(warnings);
  return parts.join(" · ");
}

function actionsOf(message) {
  const buttons = [];
  const siblings = childrenOf(current, message.parent).filter((each) => each.role === message.role);
  if (siblings.length > 1) buttons.push(branchControl(message, siblings));
  if (message.content) buttons.push(copyButton("Copy", () => message.content));
  if (message.role === "user") buttons.push(iconButton("edit", "Edit", () => editMessage(message)));
  else if (!message.error || !message.again) {
    buttons.push(iconButton("again", "Answer again", () => answerAgain(message)));
  }
  if (message.ended === "length" && message.content && message.id === current.leaf) {
    buttons.push(button("Go on", () => goOn(message)));
  }
  return buttons;
}

/** Which of the messages at this place is shown, and the ways to the others. */
function branchControl(message, siblings) {
  const at = siblings.indexOf(message);
  const step = (by, name, label) => {
    const made = iconButton(name, label, () => {
      if (runs.has(current.id)) return;
      const next = siblings[at + by];
      showBranch(current, next);
      keep(current);
      showConversation();
      const control = views.get(next.id).element.querySelector(".branches");
      const same = control.querySelector(`[aria-label="${label}"]:enabled`);
      (same ?? control.querySelector(":enabled")).focus();
    });
    made.disabled = !siblings[at + by];
    return made;
  };
  const place = make("span", {}, `${at + 1} of ${siblings.length}`);
  const [before, after] = [step(-1, "back", "The version before"), step(1, "on", "The next version")];
  return make("span", { class: "branches" }, before, place, after);
}

/** Put a box in a message's place; what is sent from it begins a branch. */
function editMessage(message) {
  const view = views.get(message.id);
  if (!view || runs.has(current.id)) return;
  const box = make("textarea", { rows: 2, "aria-label": "Edit the message", dir: "auto" });
  box.value = message.content;
  const close = () => {
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
      close();
    } else if (sends(event)) {
      event.preventDefault();
      send();
    }
  });
  const buttons = make("div", { class: "actions" }, button("Cancel", close), button("Send", send, "strong"));
  const editor = make("div", { class: "editor" }, box, buttons);
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
