"""Decides when drafts are worth the cost of verification."""

# So many tokens of all rows go through a step that takes hardly longer than for one; in few bits,
# weights take longer to decode, and half as many do.
ROOM, ROOM_FEW_BITS = 16, 8
# After so many drafts of which less than this share of tokens held, none for so many tokens.
DRAFTS, SHARE, REST = 32, 0.4, 256


def room_for_drafts(rows: int, *, few_bits: bool) -> int:
    """Return the number of tokens to draft per row in a step of this many rows."""
    return max((ROOM_FEW_BITS if few_bits else ROOM) // max(rows, 1) - 1, 0)


class Pacing:
    """Lets a row draft while steps have room and enough drafts are accepted.

    Attributes:
        limit: how many tokens there is room for in the present step.
    """

    def __init__(self) -> None:
        self.limit = ROOM
        self._drafts = self._drafted = self._accepted = 0
        self._rest = 0

    @property
    def awake(self) -> bool:
        """Whether to draft."""
        return self.limit > 0 and self._rest <= 0

    def learn(self, taken: int, drafted: int, accepted: int) -> None:
        """Learn the numbers of new tokens and accepted drafts."""
        self._rest -= taken
        if not drafted:
            return
        self._drafts += 1
        self._drafted += drafted
        self._accepted += accepted
        if self._drafts == DRAFTS:
            if self._accepted < SHARE * self._drafted:
                self._rest = REST
            self._drafts = self._drafted = self._accepted = 0
