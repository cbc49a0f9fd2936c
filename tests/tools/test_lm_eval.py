"""lm-eval asks our models as it asks Transformers', and finds them by name."""

from pathlib import Path
from typing import Any

import pytest

from conformance.families import FAMILIES, Family, each
from outside import pair, saved, tokenizer, tool
from quintet.errors import InputError
from quintet.interop import register_lm_eval

lm_eval = tool("lm_eval")
huggingface = tool("lm_eval.models.huggingface")
registry = tool("lm_eval.api.registry")
tasks = tool("lm_eval.tasks")
instance = tool("lm_eval.api.instance")
pytestmark = pytest.mark.filterwarnings("ignore")

CHOICES = [("Hello there", " how are"), ("def fib", "(n):"), ("The quick", " brown fox jumps")]
TEXTS = [("Hello there, how are you today?",), ("def fibonacci(n):\n" * 40,), ("",)]
PROMPTS = [
    ("Hello", {"until": ["o"], "max_gen_toks": 8}),
    ("def fibonacci", {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}),
]


def answers(model: Any) -> list[Any]:
    def asked(kind: str, arguments: list[Any]) -> list[Any]:
        requests = [
            instance.Instance(request_type=kind, doc={}, arguments=one, idx=n)
            for n, one in enumerate(arguments)
        ]
        return getattr(model, kind)(requests, disable_tqdm=True)

    scores = asked("loglikelihood", CHOICES)
    return [
        *(pytest.approx(score, rel=1e-4) for score, _ in scores),
        *(greedy for _, greedy in scores),
        *(pytest.approx(x, rel=1e-4) for x in asked("loglikelihood_rolling", TEXTS[:2])),
        *asked("generate_until", PROMPTS),
    ]


def plain(answer: Any) -> Any:
    return answer.expected if hasattr(answer, "expected") else answer


@each
def test_the_answers_are_those_of_transformers(family: Family, tmp_path: Path) -> None:
    ours, theirs = pair(family)
    its = tokenizer().to_transformers()
    common: dict[str, Any] = {"tokenizer": its, "device": "cpu", "batch_size": 2}
    wanted = answers(huggingface.HFLM(pretrained=theirs, **common))
    found = answers(huggingface.HFLM(pretrained=ours, **common))
    assert [plain(one) for one in found] == wanted

    register_lm_eval()
    arguments = f"pretrained={saved(family, tmp_path)},dtype=float32"
    more = {"batch_size": 2, "max_batch_size": None, "device": "cpu"}
    named = registry.get_model("quintet").create_from_arg_string(arguments, more)
    assert [plain(one) for one in answers(named)] == wanted


def test_a_model_in_fewer_bits_is_asked(tmp_path: Path) -> None:
    where = saved(FAMILIES[0], tmp_path)
    model = register_lm_eval()(str(where), quantize="int8", device="cpu", batch_size=2)
    assert len(answers(model)) == 10


def test_what_is_no_option_is_refused(tmp_path: Path) -> None:
    where = saved(FAMILIES[0], tmp_path)
    with pytest.raises(InputError, match="no option 'paralelize'"):
        register_lm_eval()(str(where), paralelize=True)
    with pytest.raises(InputError, match="quantize: a model that is loaded"):
        register_lm_eval()(pair(FAMILIES[0])[0], tokenizer(), quantize="int8")


def test_a_task_is_evaluated_by_name(tmp_path: Path) -> None:
    where, data = saved(FAMILIES[0], tmp_path / "model"), tmp_path / "data.jsonl"
    data.write_text(
        '{"q": "Hello", "c": [" there", " dog"], "a": 0}\n{"q": "def", "c": [" x", " fib"], "a": 1}'
    )
    task = {
        "task": "choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "{{a}}",
    }
    register_lm_eval()
    told = lm_eval.simple_evaluate(
        model="quintet",
        model_args={"pretrained": str(where)},
        tasks=[task],
        task_manager=tasks.TaskManager(include_defaults=False),
        device="cpu",
        verbosity="ERROR",
        bootstrap_iters=0,
    )
    assert 0 <= told["results"]["choice"]["acc,none"] <= 1
