// The settings of a conversation, the choice of a model, the theme.

const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, hint: "0 takes the likeliest token" },
  { name: "top_p", label: "Top p", min: 0, max: 1 },
  { name: "top_k", label: "Top k", min: 0, whole: true },
  { name: "min_p", label: "Min p", min: 0, max: 1 },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.01, max: 10 },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2 },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2 },
  { name: "max_tokens", label: "Longest answer", min: 1, whole: true, hint: "tokens" },
  { name: "seed", label: "Seed", min: 0, max: Number.MAX_SAFE_INTEGER, whole: true },
];
const THEMES = ["system", "light", "dark"];

function makeFields() {
  for (const { name, label, min, max, whole, hint } of FIELDS) {
    const [id, about, step] = [`set-${name}`, `about-${name}`, whole ? 1 : "any"];
    const bounds = { type: "number", inputmode: "decimal", min, max, step };
    const input = make("input", { id, ...bounds, "aria-describedby": about });
    input.addEventListener("input", () => {
      // What breaks a rule is not sent, and says why.
      input.setAttribute("aria-invalid", String(!input.validity.valid));
      $(about).textContent = input.validity.valid ? (hint ?? "") : input.validationMessage;
      set(name, input.validity.valid && input.value !== "" ? Number(input.value) : undefined);
    });
    const small = make("small", { id: about }, hint ?? "");
    $("fields").append(make("label", { class: "field" }, label, input, small));
  }
}

function set(name, value) {
  const { settings } = current;
  if (value === undefined || value === "") delete settings[name];
  else settings[name] = value;
  keep(current);
  // A system prompt belongs to its conversation; how answers are drawn is a habit.
  const { system, ...habits } = settings;
  prefer({ settings: habits });
}

function showSettings() {
  const { settings } = current;
  const model = modelOf(current);
  for (const { name, hint } of FIELDS) {
    const input = $(`set-${name}`);
    input.value = settings[name] ?? "";
    input.setAttribute("aria-invalid", "false");
    $(`about-${name}`).textContent = hint ?? "";
    const usual = model.defaults[name];
    input.placeholder = usual === null || usual === undefined ? "not set" : `default ${usual}`;
  }
  $("system").value = settings.system ?? "";
  $("thinking-field").hidden = !model.thinking;
  $("thinking").value = settings.thinking ?? "";
  $("key").value = apiKey;
  if (!$("settings").open) $("settings").showModal();
}

function backToDefaults() {
  for (const name of Object.keys(current.settings)) if (name !== "system") set(name, undefined);
  showSettings();
}

/** Learn which models there are; tells whether the server said. */
async function loadModels() {
  try {
    const said = await (await request("page/config")).json();
    models = said.models;
  } catch (error) {
    if (error.status === 401) return askForKey();
    notice(error.message, () => loadModels());
    return false;
  }
  $("model").replaceChildren(...models.map(({ id }) => make("option", { value: id }, id)));
  $("model").disabled = models.length < 2;
  showModel();
  showState();
  return true;
}

function showModel() {
  const model = modelOf(current);
  $("model").value = model.id;
  const facts = [];
  if (model.context) facts.push(`${model.id} reads up to ${model.context.toLocaleString("en")} tokens.`);
  if (model.chat === false) facts.push("It has no chat template: it was not trained to answer.");
  facts.push("Conversations are kept in this browser alone.");
  $("facts").textContent = facts.join(" ");
}

function chooseModel(id) {
  current.model = id;
  prefer({ model: id });
  keep(current);
  showModel();
  showState();
}

function showTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").querySelector("span").textContent = `Theme: ${theme}`;
}

function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(preferences.theme ?? "system") + 1) % THEMES.length];
  prefer({ theme });
  showTheme(theme);
}
