"""How long pieces are: any prompt, any speed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintet.errors import InputError
from quintet.serving.limits import GRID, Limits
from quintet.serving.pace import LEAST_TAIL, Pace


@given(
    st.integers(1, 3000),
    st.integers(0, 100),
    st.floats(1e-5, 0.02),
    st.floats(0, 0.3),
    st.floats(10, 1000),
    st.booleans(),
)
def test_a_prompt_is_read_to_its_end_in_pieces_that_prompts_kernels_take(
    prompt: int, start: int, token: float, step: float, target: float, alone: bool
) -> None:
    pace = Pace(Limits(itl_target_ms=target, piece=512))
    pace.read(256, 256 * token)
    pace.stepped(step)
    read = min(start, prompt - 1)
    begun, pieces = read, []
    while read < prompt:
        piece = pace.piece(read, prompt - read, (), alone=alone)
        pieces.append(piece)
        read += piece
        # Nothing so short that few-token kernels would run over it, unless that is all there was.
        assert piece > LEAST_TAIL or piece == prompt - begun
        assert read == prompt or read % GRID == 0
        # In time, but for the least that is worth it, and what would be left of it.
        least = 2 * GRID
        assert alone or piece <= least or piece * token <= target / 1000 - step + 1e-9
    assert read == prompt


def test_pieces_follow_what_was_measured() -> None:
    pace = Pace(Limits(itl_target_ms=200.0, piece=512))
    assert pace.most(alone=True) == 256
    assert pace.most(alone=False) == 128
    pace.read(10, 100.0)  # too little to tell
    assert pace.most(alone=False) == 128
    pace.read(256, 0.256)
    assert pace.most(alone=True) == 512
    assert pace.most(alone=False) == 192
    pace.stepped(0.1)
    assert pace.most(alone=False) == 64
    pace.stepped(10.0)
    assert pace.most(alone=False) == 64
    # Alone in a second, if that is not too short.
    for token, most in ((0.0025, 384), (0.02, 256)):
        slow = Pace(Limits(piece=512))
        slow.read(256, 256 * token)
        assert slow.most(alone=True) == most
    assert Pace(Limits(itl_target_ms=None, piece=512)).most(alone=False) == 512
    with pytest.raises(InputError, match="itl_target_ms=0"):
        Limits(itl_target_ms=0)


def test_a_piece_ends_where_it_has_to() -> None:
    pace = Pace(Limits(piece=256))
    assert pace.piece(0, 400, (70, 300), alone=True) == 70
    assert pace.piece(70, 330, (70, 300), alone=True) == 230
    assert pace.piece(300, 700, (70, 300), alone=True) == 212  # to the grid
    assert pace.piece(32, 97, (), alone=False) == 97  # nor is a token left behind
    assert pace.piece(0, 150, (), alone=False) == 64  # but for two pieces that are in time
    assert pace.piece(0, 280, (), alone=True) == 280
    assert pace.piece(40, 400, (), alone=False) == 88  # to 64 would be too short
