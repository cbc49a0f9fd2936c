// The page comes to life: buttons, keys, and what was kept from the last time.

/** Say something above the conversation until it is taken away. */
function notice(text, again = null) {
  const close = () => $("notice").replaceChildren();
  const retry = again && make("button", { type: "button", class: "quiet", click: () => (close(), again()) }, "Try again");
  $("notice").replaceChildren(make("p", {}, text), ...[retry, iconButton("close", "Close", close)].filter(Boolean));
}

/** Make the box as high as its text, up to a limit of the style. */
function grow() {
  const box = $("box");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

function submit() {
  const text = $("box").value.trim();
  if (!text || state.running.has(state.current.id)) return;
  $("box").value = "";
  grow();
  send(text);
}

function hearKeys(event) {
  const control = event.ctrlKey || event.metaKey;
  const dialog = document.querySelector("dialog[open]");
  if (event.key === "Escape" && !dialog) {
    if ($("menu").open) closeMenu();
    else if (!$("shade").hidden) toggleDrawer();
    else stop();
  } else if (control && !dialog && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    begin();
  } else if (control && !dialog && !event.shiftKey && event.key.toLowerCase() === "b") {
    event.preventDefault();
    toggleDrawer();
  } else if (control && !dialog && event.key === ",") {
    event.preventDefault();
    showSettings();
  } else if (control && !dialog && event.key === "/") {
    event.preventDefault();
    $("shortcuts").showModal();
  }
}

function hearBox(event) {
  if (sends(event)) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !$("box").value) {
    const last = branch(state.current).findLast((message) => message.role === "user");
    if (last) {
      event.preventDefault();
      editMessage(last);
    }
  }
}

function closeMenu() {
  $("menu").open = false;
  $("menu").querySelector("summary").focus();
}

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (state.running.has(state.current.id)) stop();
    else submit();
  });
  $("box").addEventListener("keydown", hearBox);
  $("box").addEventListener("input", () => {
    grow();
    showState();
  });
  $("new").addEventListener("click", begin);
  $("toggle").addEventListener("click", toggleDrawer);
  $("shade").addEventListener("click", toggleDrawer);
  $("theme").addEventListener("click", nextTheme);
  $("help").addEventListener("click", () => $("shortcuts").showModal());
  $("import").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", async () => {
    if ($("file").files[0]) await openFile($("file").files[0]);
    $("file").value = "";
  });
  $("tune").addEventListener("click", showSettings);
  $("defaults").addEventListener("click", backToDefaults);
  $("system").addEventListener("input", () => set("system", $("system").value));
  $("thinking").addEventListener("change", () => set("thinking", $("thinking").value));
  $("key").addEventListener("change", async () => {
    setApiKey($("key").value.trim());
    if (!state.models.length) await loadModels();
  });
  $("model").addEventListener("change", () => chooseModel($("model").value));
  $("latest").addEventListener("click", toEnd);
  $("scroll").addEventListener("scroll", () => ($("latest").hidden = atEnd()), { passive: true });
  for (const [id, act] of Object.entries({
    rename,
    delete: remove,
    "save-markdown": () => save("md", "text/markdown", asMarkdown(state.current)),
    "save-json": () => save("json", "application/json", asJson(state.current)),
  })) {
    $(id).addEventListener("click", () => {
      closeMenu();
      act();
    });
  }
  for (const button of document.querySelectorAll("[data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  document.addEventListener("click", (event) => {
    if ($("menu").open && !$("menu").contains(event.target)) $("menu").open = false;
    // The shade of a dialog is the dialog itself, outside of what it holds.
    if (event.target instanceof HTMLDialogElement) event.target.close();
  });
  document.addEventListener("keydown", hearKeys);
  addEventListener("storage", hearOtherTabs);
  addEventListener("pagehide", () => {
    for (const conversation of state.conversations) if (state.running.has(conversation.id)) keep(conversation);
  });
  narrow.addEventListener("change", () => showDrawer(!narrow.matches && (preferences.drawer ?? true)));
}

showTheme(THEMES.includes(preferences.theme) ? preferences.theme : "system");
makeFields();
listen();
state.conversations = storedConversations();
state.current = state.conversations.find((each) => each.id === preferences.last) ?? newConversation();
showDrawer(!narrow.matches && (preferences.drawer ?? true));
open(state.current);
loadModels();
$("box").focus();
