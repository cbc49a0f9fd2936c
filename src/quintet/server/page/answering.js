// Asking for answers: the next one, another one, the rest of one, one to other words.

// Milliseconds between two looks of an answer as it grows.
const SHOWN_EVERY = 40;
// And between two times it is stored.
const KEPT_EVERY = 2000;

function modelOf(talk) {
  return models.find((model) => model.id === talk.model) ?? models[0] ?? { id: "", defaults: {} };
}

/** Whether a key sends; it does not while it chooses among letters of a script. */
function sends(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

function put(text) {
  if (current.leaf === null && !current.named) current.title = titleFor(text);
  addMessage(current, { role: "user", content: text });
  answer(current);
}

function send(text) {
  const last = branch(current).at(-1);
  if (last?.error && !last.content) dropMessage(current, last);
  if (!talks.includes(current)) talks.unshift(current);
  put(text);
}

/** Send a message in other words: a branch beside it. */
function resend(message, text) {
  current.leaf = message.parent;
  put(text);
}

/** Another answer to the same message, beside the one there is unless that failed. */
function answerAgain(reply) {
  if (runs.has(current.id)) return;
  current.leaf = reply.parent;
  if (reply.error && !reply.content) dropMessage(current, reply);
  answer(current);
}

function goOn(reply) {
  if (!runs.has(current.id)) answer(current, reply);
}

function stop(talk = current) {
  runs.get(talk.id)?.controller.abort();
}

/** Ask for an answer to the branch that is shown, or for the rest of one that was cut. */
async function answer(talk, begun = null) {
  const reply = begun ?? addMessage(talk, { role: "assistant", content: "", reasoning: "" });
  const asked = performance.now();
  const run = { reply, controller: new AbortController(), phase: "waiting", asked, since: asked, pieces: 0 };
  const before = begun?.figures?.tokens ?? 0;
  Object.assign(reply, { error: "", ended: "", about: 0 });
  runs.set(talk.id, run);
  keep(talk);
  showConversations();
  if (talk === current) {
    showConversation();
    toEnd();
  }
  let changed = true;
  const show = () => {
    if (changed) following(() => showMessage(reply));
    changed = false;
  };
  const clocks = [
    setInterval(show, SHOWN_EVERY),
    setInterval(() => keep(talk), KEPT_EVERY),
    // The seconds that one waits go on while nothing comes.
    setInterval(() => (changed = true), 1000),
  ];
  let refused = false;
  try {
    if (!models.length) await loadModels();
    const body = bodyFor(talk, begun);
    reply.model = body.model;
    for await (const piece of chat(body, run.controller.signal)) {
      hear(run, piece, before);
      changed = true;
    }
  } catch (error) {
    if (error.name === "AbortError") Object.assign(reply, { ended: "stopped", about: run.pieces });
    else {
      reply.error = error instanceof Failure ? error.message : "The server sent something that is no answer.";
      reply.again = error.again ?? true;
      refused = error.status === 401;
    }
  }
  clocks.forEach(clearInterval);
  runs.delete(talk.id);
  talk.updated = Date.now();
  keep(talk);
  showConversations();
  if (talk === current) {
    following(() => {
      showMessage(reply);
      showState();
    });
    if (!reply.error) say(spoken(reply));
    // Of a model that was loaded for this answer more is known now.
    if (!modelOf(talk).context) loadModels();
    if (refused && (await askForKey())) answerAgain(reply);
  }
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
    reply.warnings = piece.warnings;
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
      // Of an answer in two parts, the speed of the later one.
      speed: run.last > run.first ? ((tokens - 1) * 1000) / (run.last - run.first) : 0,
    };
  }
}

function bodyFor(talk, begun) {
  const model = modelOf(talk);
  const { system, thinking, ...sampling } = talk.settings;
  // What a model thought is not part of what it reads.
  const said = branch(talk).filter(({ content }) => content);
  const messages = said.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });
  const stream = { stream: true, stream_options: { include_usage: true } };
  const body = { model: model.id, messages, ...stream, ...sampling };
  if (thinking && model.thinking) body.reasoning_effort = thinking === "on" ? "medium" : "none";
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
  return models.length > 0 || (await loadModels());
}
