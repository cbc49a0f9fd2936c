// Asking for answers: the next one, another one, the rest of one, one to other words.

const SHOWN_EVERY = 40; // milliseconds between two looks of an answer as it grows
const KEPT_EVERY = 2000; // and between two times it is stored

function currentModel() {
  return state.models.find((model) => model.id === state.current.model) ?? state.models[0] ?? { id: "", context: 0, defaults: {}, thinking: null };
}

/** Whether a key sends; it does not while it chooses among letters of a script. */
function sends(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

function send(text) {
  const conversation = state.current;
  if (!branch(conversation).length && !conversation.named) conversation.title = titleFor(text);
  dropFailed(conversation);
  addMessage(conversation, { role: "user", content: text });
  if (!state.conversations.includes(conversation)) state.conversations.unshift(conversation);
  answer(conversation);
}

/** Send a message in other words: a branch beside it. */
function resend(message, text) {
  const conversation = state.current;
  const first = message.parent === null;
  if (first && !conversation.named) conversation.title = titleFor(text);
  conversation.leaf = message.parent;
  addMessage(conversation, { role: "user", content: text });
  answer(conversation);
}

/** Another answer to the same message, beside the one there is unless that failed. */
function answerAgain(reply) {
  if (state.running.has(state.current.id)) return;
  state.current.leaf = reply.parent;
  if (reply.error && !reply.content) dropMessage(state.current, reply);
  answer(state.current);
}

function goOn(reply) {
  if (!state.running.has(state.current.id)) answer(state.current, reply);
}

function stop(conversation = state.current) {
  state.running.get(conversation.id)?.controller.abort();
}

function dropFailed(conversation) {
  const last = branch(conversation).at(-1);
  if (last?.error && !last.content) dropMessage(conversation, last);
}

/** Ask for an answer to the branch that is shown, or for the rest of one that was cut. */
async function answer(conversation, begun = null) {
  const body = bodyFor(conversation, begun);
  const reply = begun ?? addMessage(conversation, { role: "assistant", content: "", reasoning: "", model: body.model });
  const run = { reply, controller: new AbortController(), phase: "waiting", since: performance.now(), asked: performance.now(), pieces: 0, first: 0, last: 0 };
  const before = begun?.figures?.tokens ?? 0;
  delete reply.error;
  delete reply.ended;
  state.running.set(conversation.id, run);
  keep(conversation);
  showConversations();
  if (conversation === state.current) {
    showConversation();
    toEnd();
  }
  const show = () => following(() => showMessage(reply));
  const ticking = setInterval(() => ["waiting", "reading"].includes(run.phase) && show(), 1000);
  const storing = setInterval(() => keep(conversation), KEPT_EVERY);
  let refused = false;
  try {
    let shown = 0;
    for await (const piece of chat(body, run.controller.signal)) {
      hear(run, piece, before);
      if (performance.now() - shown >= SHOWN_EVERY) {
        show();
        shown = performance.now();
        // Let the browser draw and listen, however fast pieces come.
        await new Promise((resolve) => setTimeout(resolve, 0));
      }
    }
  } catch (error) {
    if (error.name === "AbortError") reply.ended = "stopped";
    else {
      reply.error = error instanceof Failure ? error.message : "The server sent something that is no answer.";
      reply.again = error.again ?? true;
      refused = error.status === 401;
    }
  }
  clearInterval(ticking);
  clearInterval(storing);
  state.running.delete(conversation.id);
  conversation.updated = Date.now();
  keep(conversation);
  showConversations();
  if (conversation === state.current) {
    following(() => {
      showMessage(reply);
      showState();
    });
    // Buttons of other messages may go through branches again.
    for (const [id, view] of views) if (id !== reply.id) refreshActions(conversation.messages[id], view);
    if (!reply.error) say(spoken(reply));
    if (refused && (await askForKey())) answerAgain(reply);
  }
}

function refreshActions(message, view) {
  if (!view.actions.contains(document.activeElement)) view.actions.replaceChildren(...actionsOf(message));
}

function spoken(reply) {
  const text = views.get(reply.id)?.body.innerText.trim() ?? "";
  if (reply.ended === "stopped") return "Stopped";
  return text ? `Answer: ${text}` : "The answer is empty";
}

/** Take a piece of an answer. */
function hear(run, piece, before) {
  const { reply } = run;
  const now = performance.now();
  if (piece.heard) {
    run.phase = "reading";
    run.since = now;
    return;
  }
  if (piece.content || piece.reasoning) {
    if (!run.pieces) {
      run.phase = "writing";
      run.first = run.since = now;
    }
    run.pieces += 1;
    run.last = now;
    if (piece.content && reply.reasoning && !reply.content) reply.thought = (now - run.first) / 1000;
    reply.content += piece.content;
    reply.reasoning += piece.reasoning;
  }
  if (piece.ended) reply.ended = piece.ended;
  if (piece.usage) {
    const { completion_tokens: tokens, prompt_tokens: prompt, prompt_tokens_details: details } = piece.usage;
    reply.figures = {
      tokens: before + tokens,
      prompt,
      total: prompt + tokens,
      cached: details?.cached_tokens ?? 0,
      first: (run.first - run.asked) / 1000,
      // Of two parts of an answer, the speed of the later one.
      seconds: ((run.last - run.first) / 1000) * ((before + tokens - 1) / Math.max(tokens - 1, 1)),
    };
  }
}

function bodyFor(conversation, begun) {
  const model = currentModel();
  const { system, thinking, ...sampling } = conversation.settings;
  // What a model thought is not part of what it reads.
  const messages = branch(conversation).filter(({ content }) => content).map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });
  const body = { model: model.id, messages, stream: true, stream_options: { include_usage: true }, ...sampling };
  if (thinking && model.thinking) body.chat_template_kwargs = { [model.thinking]: thinking === "on" };
  if (begun) body.continue_final_message = true;
  return body;
}

/** Ask for the key of the server; tells whether one was given. */
async function askForKey() {
  const key = await ask({
    title: "API key",
    text: "The server wants a key. It is kept in this tab alone, until the tab is closed.",
    yes: "Use it",
    value: "",
    secret: true,
  });
  if (!key) return false;
  setApiKey(key);
  return state.models.length > 0 || (await loadModels());
}
