r"""Give the verifiers of mathematics, numbers and letters answers made to hang, execute or cheat, and see that none does.

    python -m tests.harness.hostile [--deadline 2] [--every 1]

Each answer is judged as mathematics for a gold of 5 and for one that is a formula, boxed after a think block and bare; as a
number for a gold of 5, as a choice for a gold of A, and by polynomial_multiplication of reasoning-gym, whose scorer hands text
to sympy; and leniently by the first three (there only for its time: taking "5 or 6" for its last number is what lenient means).
Nothing may take longer than the deadline and one second, touch the marker file, or be accepted; after each the verifier of
mathematics must still judge rightly. Exit code 1 otherwise.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from stillhouse.pipeline.problems import reasoning_gym_problems
from stillhouse.pipeline.verification import verify
from stillhouse.pipeline.verifiers.rows import judge_row
from tests.harness.side_by_side import parser_of

SLACK_S = 1.0


def hostile_answers(marker: Path) -> list[str]:
    """Answers, none of which is 5; ``marker`` is the file that they try to write."""
    write = f"open({str(marker)!r},'w').write('x')"
    towers = [
        "9**9**9**9**9", r"10^{10^{10^{10}}}", "2^{2^{2^{2^{2^{2^{2}}}}}}", r"(10^{10^{9}})!", "9!!!!!!!!", "((9!)!)!",
        r"2^{99999999999}", r"3^{3^{3^{3}}} \bmod 7", r"\sum_{k=1}^{10^{12}} k^{k}", r"\prod_{n=1}^{10^{9}} n",
        r"\int_0^{10^{10}} e^{x^{x}} dx", r"\binom{10^{9}}{5\cdot 10^{8}}", r"10^{-10^{10}}", r"\sqrt[10^{12}]{10^{10^{12}}}",
        r"\gcd(10^{10^{9}}, 7)", "1e999999999999", r"\lim_{n\to\infty} n^{n^{n}}", r"0^{-10^{10}}",
        r"\frac{1}{3^{99999}}+" + "+".join(rf"\frac{{1}}{{{p}^{{40000}}}}" for p in (5, 7, 11, 13, 17, 19, 23)),
        "+".join(f"{n}^{{{10_000 + n}}}" for n in range(2, 90)), r"\log_{10^{-10^{9}}} 5", r"\sin(10^{10^{8}})",
    ]  # fmt: skip
    giants = [
        "9" * 3_900, "9" * 100_000, "1" + "+1" * 1_900, "x" * 3_900, "(" * 1_900 + "5" + ")" * 1_900, "{" * 1_950,
        "}" * 1_950, "\\frac{" * 600 + "1", "\\sqrt{" * 500 + "2" + "}" * 500, "\\boxed{" * 500 + "4" + "}" * 500,
        "\\left(" * 600, "-" * 3_901 + "5", "2^" * 1_900 + "2", "5" + "!" * 3_900, "5" + "'" * 3_900, "1/" * 1_900 + "7",
        "\\pm " * 900 + "4", "1,2," * 900 + "3", "\\begin{pmatrix}" * 200, "\\begin{pmatrix}1&1\\\\1&1\\end{pmatrix}" * 60,
        "|" * 3_000, "\\text{" * 700, "\\{" * 1_900, " " * 3_000 + "4" + " " * 900, "$" * 3_001, "\\[" * 1_900, "1 " * 1_900,
        "a_{" * 900, "\\cup" * 900, "f(" * 1_500, "4=" * 1_900 + "4", "%" * 3_900, "\\" * 3_901, "\n" * 3_900 + "4",
        "answer is " * 390, "\\frac12" * 500 + "x", "0." + "0" * 3_890 + "1", "C_" * 1_900, "{}_" * 1_300, "(mod " * 780,
        "\\left\\{\\begin{array}" * 180, "P(|" * 1_300, "_5C_2" * 700, "\\text{ for all } x" * 200, "\\mathrm{m}/" * 350,
        "+".join(["\\lfloor x/3\\rfloor"] * 150), "+".join(f"|x-{n}|" for n in range(300)), "\\max(" * 200 + "1" + ")" * 200,
        ",".join(f"{a}{b}=4" for a in "abcdfgh" for b in "klmnopqrstuvwxyz"), "5 (" * 1_200, "March 3 " * 480, "个" * 3_900,
        "5" + " " * 3_900 + "6", "5" + "\t" * 3_900 + "6", "5" + "\\bmod 3" * 330, "5B\\(\\circ*" * 390, "5\\\\ " * 900 + "x",
        "A. B. " * 600, "Not" + " " * 3_900 + "x", "A" + "/" * 3_900, "answer" + " " * 3_900 + "x", "(A) or " * 500 + "(B)",
    ]  # fmt: skip
    injections = [
        write, f"__import__('os').system('touch {marker}')", f"\\text{{{write}}}", f"sympy.sympify(\"{write}\")",
        f"${write}$", f"\\immediate\\write18{{touch {marker}}}", "\\input{/etc/passwd}", "{{5}}.__class__.__mro__",
        "lambda: 5", "exit()", "quit()", "().__class__.__base__.__subclasses__()", f"[c for c in [1] if {write}]",
        f"5 if {write} else 4", "';DROP TABLE golds;--", f"eval(\"{write}\")", f"exec(\"{write}\")", f"`touch {marker}`",
        f"$(touch {marker})", "%s%s%s%n", "{gold}", "{0.__init__}", "gold", "answer", 'entry["answer"]', "True", "None",
        "nan", "inf", "\\infty", "\\$", "\x00", "5\x00 or 6", "\u202e4", "\ud800", "\\def\\x{\\x\\x}\\x",
        "\\newcommand{\\b}{\\b\\b}\\b", "\\catcode`\\%=12", "\\csname 5\\endcsname", "x:=5; 4", "#{4}", "[]", "{}", "()",
    ]  # fmt: skip
    cheats = [
        "4 or 5 or 6", "5, 6", "\\{5, 6\\}", "any number", "x", "the gold answer", "5 and not 5", "\\pm 5",
        "5 \\text{ or } 7", "[4, 6]", "(5", "5)", "5 \\ne 5", "x \\ge 5", "4 \\approx 5", "4 = 5", "5 6", "05 + 1",
        "5.0000000001", "5_7 + 1", "\\boxed{}", "answer = gold", "\\overline{5}5", "5i", "5\\pi", "5x", "6-\\epsilon",
        "\\ln 0", "5+\\ln 0", "5\\text{ or more}", "\\text{not }5", "5_{0}", "101_{1-0}", "2x=5", "\\max(5,x)", "x5",
        "a=5, b=5", "C(5,1)-C(5,5)", "\\lfloor x\\rfloor+5", "5\\pmod{4}", "5\\begin{pmatrix}1\\end{pmatrix}",
        "9^{9^{9^9}} \\bmod 10", "\\mathbb{R}", "5 \\to 6", "\\lfloor 5.5 \\rfloor + 1", "-5", "|5|+|1|", "\\sqrt{25.1}",
        "5 hundred", "-x=5", "x+1=5", "A or B", "A. 5, B. 6", "\\lnot A", "not A", "A^c", "A) no, B",
    ]  # fmt: skip
    return towers + giants + injections + cheats


def run(deadline_s: float, answers_of: slice = slice(None)) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder) / "written"
        answers = hostile_answers(marker)[answers_of]
        (polynomial,) = reasoning_gym_problems("polynomial_multiplication", split="test", size=1, seed=7, options={})
        verify(polynomial, polynomial.answer)
        judge_row("math", {"gold": "\\int x dx", "pred": "\\int y dx"})  # the processes' own start is not the answer's doing
        accepted, slow, spoiled = [], [], []
        longest = 0.0
        num_undecided = 0
        for answer in answers:
            ways = [
                (
                    "strict",
                    lambda a=answer: judge_row(
                        "math", {"gold": "5", "pred": f"<think></think>\\boxed{{{a}}}"}, timeout_s=deadline_s
                    )["verdict"],
                ),
                ("bare", lambda a=answer: judge_row("math", {"gold": "5", "pred": a}, timeout_s=deadline_s)["verdict"]),
                (
                    "formula",
                    lambda a=answer: judge_row("math", {"gold": "x^2+\\sqrt{5}", "pred": a}, timeout_s=deadline_s)["verdict"],
                ),
                (
                    "number",
                    lambda a=answer: judge_row("number", {"gold": "5", "pred": f"\\boxed{{{a}}}", "rel_tol": 1e-12})["verdict"],
                ),
                ("choice", lambda a=answer: judge_row("choice", {"gold": "A", "pred": f"\\boxed{{{a}}}"})["verdict"]),
                ("scorer", lambda a=answer: verify(polynomial, a, timeout_s=deadline_s).outcome),
            ]
            for way, judged in ways:
                start = time.monotonic()
                verdict = judged()
                seconds = time.monotonic() - start
                longest = max(longest, seconds)
                num_undecided += verdict == "undecided"
                if verdict == "correct":
                    accepted.append((way, answer[:80]))
                if seconds > deadline_s + SLACK_S:
                    slow.append((way, answer[:80], round(seconds, 2)))
            for kind, gold in (("math", "5"), ("number", "5 km"), ("choice", "A")):
                start = time.monotonic()
                judge_row(kind, {"gold": gold, "pred": answer}, extract="lenient", timeout_s=deadline_s)
                if (seconds := time.monotonic() - start) > deadline_s + SLACK_S:
                    slow.append((f"lenient {kind}", answer[:80], round(seconds, 2)))
                longest = max(longest, seconds)
            after = judge_row("math", {"gold": "(x+1)^2", "pred": "x^2+2x+1"})["verdict"]
            if after != "correct":
                spoiled.append((answer[:80], after))
        return {
            "num_answers": len(answers),
            "num_verdicts": 9 * len(answers),
            "accepted": accepted,
            "past_deadline": slow,
            "longest_s": round(longest, 2),
            "deadline_s": deadline_s,
            "undecided": num_undecided,
            "executed": marker.exists(),
            "next_item_spoiled": spoiled,
        }


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds an item may take")
    parser.add_argument("--every", type=int, default=1, help="one answer in so many")
    arguments = parser.parse_args()
    report = run(arguments.deadline, slice(None, None, arguments.every))
    print(json.dumps(report, indent=2))
    return 1 if any(report[broken] for broken in ("accepted", "past_deadline", "executed", "next_item_spoiled")) else 0


if __name__ == "__main__":
    sys.exit(main())
