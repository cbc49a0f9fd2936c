"""Cases of engines on several processes; the first has it, and the others follow."""

from typing import Any

import torch

from parallel.cases.generate import chooses, models, raised
from quintet.errors import InputError
from quintet.generation.engine import Engine
from quintet.generation.following import follow
from quintet.serving.engine import Engine as ServingEngine
from quintet.serving.limits import Limits

PREDICTS = {"num_nextn_predict_layers": 1}
TEXTS = [[5, 17, 42, 3, 88], [5, 17, 42, 3, 88, 9, 61, 2], [71, 14, 6]]


def steps(name: str, degrees: dict[str, int], options: dict[str, Any]) -> None:
    """Sequences come, leave in the middle, go on from a copy of what their row held, and end."""
    whole, parts = models(name, degrees, PREDICTS if "use_mtp" in options else {})
    if not chooses():
        raised(lambda: Engine(parts, 1, 8), InputError)
        return follow(parts)

    def made(model: Any) -> list[list[int]]:
        engine = Engine(model, 2, 48)
        texts = [
            engine.sequence(
                text,
                generator=torch.Generator().manual_seed(number),
                max_new_tokens=20,
                **options,
            )
            for number, text in enumerate(TEXTS)
        ]
        first, second, third = texts
        engine.add(first)
        engine.step([first], piece=3)
        engine.add(second)
        for _ in range(4):
            engine.step([second, first], piece=3)
        # One gives its row to another, and goes on later from what it held.
        held = engine.extract(second, 0, 4), engine.extract(second, 4)
        # That ends before the sequence does: the tail alone has the states.
        engine.remove(second)
        engine.add(third)
        for _ in range(3):
            engine.step([first, third])
        first.cancel()
        engine.step([first, third])
        engine.remove(first)
        engine.add(second, *held)
        while not (second.finished and third.finished):
            engine.step([second, third])
        again = engine.sequence(TEXTS[0], max_new_tokens=4)
        engine.remove(third)
        raised(lambda: engine.add(again, held[0].split(2)[1]), InputError)
        engine.close()
        return [text.ids for text in texts]

    assert made(parts) == made(whole)


def served(name: str, degrees: dict[str, int], options: dict[str, Any]) -> None:
    """A serving engine answers, keeps what it read, and lets the others go when it is closed."""
    whole, parts = models(name, degrees)
    if not chooses():
        return follow(parts)
    answers = []
    for model in (parts, whole):
        with ServingEngine(model, limits=Limits(rows=2, capacity=48)) as engine:
            answers.append(
                [
                    [token for one in engine.answer(text, **options) for token in one.ids]
                    for text in (*TEXTS, *reversed(TEXTS))
                ]
            )
    assert answers[0] == answers[1]
