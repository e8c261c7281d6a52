"""Probes: short texts on which two tokenizers differ if they differ anywhere that matters."""

from collections.abc import Iterable
from itertools import product

# One of each kind of character that the rules of tokenizers tell apart.
_KINDS = "aB'séü\u03011٣ \n\r\t\u3000_.<｜▁Ġ你の한😀"
_TEXTS = (
    "",
    "The quick brown fox can't jump, we'll see; IT'S O'Neill's — “quoted” … naïve café.",
    "def f(self, *args):\n    return [x ** 2 for x in range(10_000)]  # comment\n\n",
    "\tif (a != b) {\r\n\t\treturn 0x1F;\r\n\t}\r\n",
    '{"key": [1, 2.5e-10, null], "url": "https://example.org/a?b=c&d=%20#e", "path": "C:\\\\Users\\\\x"}',
    '| a | b |\n|---|:-:|\n| $\\frac{1}{2}$ | `x` |\n\n<p class="x">&nbsp;</p>\n- [ ] list\n',
    "0 12 345 6789 1234567890123 3.14159 1,000,000 2024-02-29 ١٢٣ １２３ ²³ Ⅻ ½ 5kg v1.2.3",
    "深度学习模型在多模态数据上训练。今天天气很好，我们去公园吧！",
    "日本語のテキスト、カタカナとひらがな。한국어 문장도 있습니다。",
    "GPT模型2024年发布v2版本，参数量7B。東京タワーは333mです",
    "Съешь же ещё этих мягких французских булок. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. İstanbul'da ışık",
    "نص عربي مع أرقام ١٢٣ وتشكيلٌ. טקסט בעברית. हिन्दी में पाठ क्षत्रिय। ภาษาไทยไม่มีช่องว่าง",
    "e\u0301 a\u0308\u0323 ﬁ ŉ Å Å ẞ ǆ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 👍🏽 ❤️ 1️⃣ ☺︎ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 𠮷野家 \ue000 \U000f0000",
    "\x00\x01\x1b[0m\x7f\x80\x85\xa0\xad\u200b\u200d\u200e\u2028\u2029\u2060\ufeff\ufffd",
    "".join(" " * run + "x" for run in range(1, 40)) + "\n" * 9 + "\t" * 9 + " \n \n\t\n  \r\n\r\n ",
    "<0x0A> <0xE4><0xBD> Ġthe Ċ ▁▁▁ ▁a▁ </w> ## @@ <unk> [UNK] <s>",
    "a" * 3000 + "=" * 1000 + " " * 1000 + "\n" * 500 + "1" * 500 + "你" * 500 + "😀" * 200,
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==" * 5,
)


def probes(special: Iterable[str]) -> list[str]:
    """Texts of many languages and of code, runs of one character, spelled-out special tokens, and every three kinds of
    character in a row.

    Args:
        special: spellings of the special tokens, which are ordinary text here.
    """
    spelled = [*special][:200]
    return [
        *_TEXTS,
        *(f"a{name} {name}b\n{name}1{name[:-1]} {name[1:]}" for name in spelled),
        "".join(spelled),
        "".join(map("".join, product(_KINDS, repeat=3))),
    ]
