"""See that a model goes in circles while it still writes, so that its stream can be stopped and no more is paid for it.

Two rules, both about the very end of the text, so that a passage that repeats and is then left does not count:

- **period**: the last 1,000 characters or more are one passage over and over, at least 6 times ("Wait, let me check again. So
  the answer is 12. Wait, let me check …"). A passage shorter than 20 characters has to fill 4,000 characters.
- **lines**: the same line 20 times in a row, blank lines not counted, with at least 4 characters in it.

What looks like a loop and is none would need to be exact to the character: counting, tables, long divisions and digit strings
change with every round. A ruler of 4,000 dashes, a table of residues that comes round six times and 20 equal
lines of a listing are called a loop.
What is a loop and is not seen: one whose rounds differ (a counter in it), or that is longer than 2,700 characters a round.
"""

from __future__ import annotations

from dataclasses import dataclass

TAIL_CHARACTERS = 16_384
"""As much of the end of a text as is ever looked at."""
_PROBE_CHARACTERS = 32
_MAX_CANDIDATES = 32


@dataclass(frozen=True, slots=True)
class LoopDetector:
    """Call it with a text that grows, or with its last `TAIL_CHARACTERS`, every few hundred characters.

    It keeps no state, so one serves every stream at once. A call costs microseconds whatever the text's length; see
    `stillhouse.teachers.endpoint.ChatClient`, which calls every 500 characters.
    """

    min_characters: int = 1_000
    min_repeats: int = 6
    min_period: int = 20
    min_characters_of_short_periods: int = 4_000
    min_equal_lines: int = 20
    min_line_characters: int = 4

    def __call__(self, text: str) -> str | None:
        """What repeats at the end of ``text``, in words; None where nothing does."""
        tail = text[-TAIL_CHARACTERS:]
        return self._period(tail) or self._lines(tail)

    def _period(self, tail: str) -> str | None:
        if len(tail) < self.min_characters:
            return None
        # The end of a loop stood there one round earlier as well: each earlier place of the last characters is a candidate.
        probe = tail[-_PROBE_CHARACTERS:]
        end = len(tail) - 1
        for _ in range(_MAX_CANDIDATES):
            at = tail.rfind(probe, 0, end)
            if at < 0:
                return None
            period = len(tail) - _PROBE_CHARACTERS - at
            least = self.min_characters if period >= self.min_period else self.min_characters_of_short_periods
            length = max(least, self.min_repeats * period)
            if length > len(tail):
                return None
            if tail[len(tail) - length : -period] == tail[len(tail) - length + period :]:
                return f"the last {length} characters are {period} characters over and over"
            end = at + _PROBE_CHARACTERS - 1
        return None

    def _lines(self, tail: str) -> str | None:
        # The last piece is a line that is still being written; blank lines between are as many again.
        pieces = tail.rsplit("\n", 2 * self.min_equal_lines + 1)[1:-1]
        lines = [stripped for piece in pieces if (stripped := piece.strip())][-self.min_equal_lines :]
        if len(lines) < self.min_equal_lines or len(lines[0]) < self.min_line_characters or len(set(lines)) > 1:
            return None
        return f"the last {self.min_equal_lines} lines are the same"
