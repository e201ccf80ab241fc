"""What both sides are given: texts, chats, prompts and varied strings, the same in every run. No test in here."""

import itertools
import pathlib
import random

LICENSE = (pathlib.Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")

# name → text, from 16 tokens to more than 512 (readers cut at MAX_TOKENS)
MAX_TOKENS = 512
TEXTS = {
    "sentence": "The ferry was late again, so we shared the last sandwich on the pier.",
    "story": (
        "Marta had kept the letter in her coat for eleven days. Each morning she told herself that the post office was "
        "closed, or too far, or full of people who would look at the address and know. On the twelfth day it rained, "
        "and the ink began to run, and there was nothing left to decide. She read it once more under the awning of the "
        "bakery, laughed at the part about the goat, and dropped it in the red box. Then she walked home without an "
        'umbrella. "Well," said her brother, when she stood dripping in the kitchen, "either you have fallen in the '
        "canal or you have finally grown up.\" She didn't answer. She put the kettle on, and only when the water had "
        "started to sing did she notice that her hands were no longer shaking."
    ),
    "python": (
        "def merge(left: list[int], right: list[int]) -> list[int]:\n"
        '    """Merge two sorted lists."""\n'
        "    out, i, j = [], 0, 0\n"
        "    while i < len(left) and j < len(right):\n"
        "        if left[i] <= right[j]:\n"
        "            out.append(left[i])\n"
        "            i += 1\n"
        "        else:\n"
        "            out.append(right[j])\n"
        "            j += 1\n"
        "    return out + left[i:] + right[j:]\n\n\n"
        "assert merge([1, 4, 9], [2, 3, 10, 11]) == [1, 2, 3, 4, 9, 10, 11]\n"
        "for n in range(0, 100, 25):\n"
        "    print(f\"{n:>4d} {'#' * (n // 5)}\")\n"
    ),
    "html": (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>Prices</title>\n'
        "<style>td { padding: 0.25em 1em; color: #336699; }</style></head>\n<body>\n<table>\n"
        "  <tr><th>item</th><th>price</th></tr>\n  <tr><td>pears</td><td>€2.49</td></tr>\n"
        "  <tr><td>bread</td><td>€3.10</td></tr>\n</table>\n"
        "<script>\n  const cells = [...document.querySelectorAll('td:last-child')];\n"
        "  console.log(cells.map(c => parseFloat(c.textContent.slice(1))).reduce((a, b) => a + b, 0));\n"
        "</script>\n</body>\n</html>\n"
    ),
    "list": (
        "Before you leave for the mountains:\n\n1. Water, at least 2 litres each\n2. Map (1:25000) and compass\n"
        "3. First aid:\n   - plasters\n   - bandage, 6 cm x 4 m\n   - tweezers\n4. Two torches; spare batteries\n"
        "5. Food\n   * nuts, 200 g\n   * bread and cheese\n   * chocolate (do not eat it all at once!)\n6. Whistle\n\n"
        "| day | from | to | km |\n|----:|------|----|---:|\n| 1 | village | lower hut | 9.5 |\n"
        "| 2 | lower hut | pass (2,310 m) | 7.25 |\n| 3 | pass | lake | 12 |\n"
    ),
    "numbers": (
        "3.14159265358979 2.71828182845905 1.41421356237310 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610 and "
        "2 + 2 = 4, 7 * 8 = 56, 144 / 12 = 12. On 2024-02-29 at 13:45:07 the sensor read -12.75 °C; 1013.25 hPa; 0x7f."
    ),
    "french": (
        "Le train de nuit s'arrêta en pleine campagne, sans raison apparente. Quelques voyageurs ouvrirent les fenêtres ; "
        "l'air sentait le foin coupé et la pluie. « Nous repartirons bientôt », annonça le contrôleur, qui n'en savait rien."
    ),
    "german": (
        "Übermorgen beginnt die Straßenbahn wieder zu fahren, sagte der Bürgermeister, und niemand glaubte ihm. Die "
        "Rechtsschutzversicherungsgesellschaften hatten längst andere Sorgen: Größe, Maß, Fuß und Öl."
    ),
    "cyrillic_greek": "Всё смешалось в доме, и никто не спал до утра. Ἐν ἀρχῇ ἦν ὁ λόγος· καλημέρα κόσμε!",
    "chinese_japanese": "春天来了，河边的柳树又绿了。孩子们在堤上放风筝。吾輩は猫である。名前はまだ無い。どこで生れたか。",
    "arabic_hindi": "كان المطر يهطل على المدينة القديمة طوال الليل. बारिश के बाद सड़क पर बच्चे खेल रहे थे।",
    "chat": (
        "<|im_start|>system\nYou are a patient teacher.<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>\n"
        "<|im_start|>assistant\nBecause air scatters short waves of light more than long ones.<|im_end|>\n"
        "<|im_start|>user\nThen why are sunsets red? 🌇<|im_end|>\n<|im_start|>assistant\n"
    ),
    "licence": LICENSE,
}

CHATS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Are cats liquid?"}],
    [{"role": "system", "content": "You are a pirate."}],
    [
        {"role": "user", "content": "I lost my keys."},
        {"role": "assistant", "content": "Where did you last see them?"},
        {"role": "user", "content": "On the kitchen table, at 7:45."},
    ],
    [
        {"role": "system", "content": "Be brief.\nBe kind.\n"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "  and 12 + 30?  "},
        {"role": "assistant", "content": "42"},
    ],
    [{"role": "user", "content": ""}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "\n\n"}],
    [{"role": "assistant", "content": "I speak first."}, {"role": "user", "content": "Why?"}],
    [{"role": "user", "content": "Ignore this: <|im_end|>\n<|im_start|>system\nand this <|endoftext|>"}],
    [{"role": "user", "content": "{{ messages }} {% if true %}x{% endif %} <b>&amp;</b> \"quotes\" 'single' \\n"}],
    [
        {"role": "assistant", "content": "12:30 ½"},
        {"role": "user", "content": "¿Qué hora es? 现在几点？ Который час? 👨‍👩‍👧‍👦"},
    ],
    [{"role": "user", "content": "first"}, {"role": "user", "content": "second"}],
    [{"role": "user", "content": "first"}, {"role": "system", "content": "a system turn in the middle"}],
]

# Texts and chats to continue.
PROMPTS = [
    "Once upon a time, in a village by the sea,",
    "The three most important things to know about bread are",
    "def fibonacci(n):\n",
    "Dear Ms Okafor,\n\nThank you for",
    "1, 2, 4, 8, 16,",
    CHATS[1],
    [{"role": "user", "content": "Write a haiku about rain."}],
    [
        {"role": "system", "content": "You are a gloomy weather forecaster."},
        {"role": "user", "content": "How will tomorrow be?"},
    ],
    CHATS[4],
    [{"role": "user", "content": "My dog died this morning and I don't know what to do."}],
]

_SAMPLES = """
All human beings are born free and equal in dignity and rights.
Tous les êtres humains naissent libres et égaux ; qu'est-ce que c'est ?
Alle Menschen sind frei und gleich an Würde und Rechten geboren. Straße, ẞ
Todos los seres humanos nacen libres. ¿Por qué no? ¡Mañana!
Wszyscy ludzie rodzą się wolni: zażółć gęślą jaźń
Všichni lidé se rodí svobodní: příliš žluťoučký kůň
Bütün insanlar hür doğarlar: İstanbul ışığı
Tất cả mọi người sinh ra đều được tự do
Všetci ľudia sa rodia slobodní · Ŝipo ĉiam naĝas · Sævör grét áðan
Все люди рождаются свободными; її ґанок, ђаво, ўзор
Όλοι οι άνθρωποι γεννιούνται ελεύθεροι· ᾧ ἐν ἀρχῇ
Բոլոր մարդիկ ծնվում են ազատ
ყველა ადამიანი იბადება თავისუფალი ႠႡႢ
כל בני האדם נולדו בני חורין שָׁלוֹם
يولد جميع الناس أحرارًا؛ ما هذا؟ ﷽ ﻻ
تمام انسان‌ها آزاد زاده می‌شوند ۱۲۳
تمام انسان آزاد پیدا ہوئے ہیں
ܟܠ ܒܪܢܫܐ
सभी मनुष्य स्वतन्त्र जन्म लेते हैं क्ष त्र ज्ञ
সমস্ত মানুষ স্বাধীনভাবে জন্মগ্রহণ করে ৭৮৯
ਸਾਰੇ ਇਨਸਾਨ ਆਜ਼ਾਦ ਹਨ
બધા માનવીઓ જન્મથી સ્વતંત્ર છે
மனிதர்கள் அனைவரும் சுதந்திரமாக பிறக்கின்றனர் ௧௨௩
అందరు మానవులు స్వతంత్రులు
ಎಲ್ಲಾ ಮಾನವರು ಸ್ವತಂತ್ರರು
എല്ലാ മനുഷ്യരും സ്വതന്ത്രരാണ്
සියලු මනුෂ්‍යයෝ නිදහස්ව උපත ලබති
มนุษย์ทั้งหลายเกิดมามีอิสระ ๑๒๓
ມະນຸດທຸກຄົນເກີດມາມີອິດສະຫຼະ
လူတိုင်းသည် လွတ်လပ်စွာ မွေးဖွား၏
មនុស្សទាំងអស់កើតមកមានសេរីភាព
འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་
ሰው ሁሉ ነፃ ሆኖ ይወለዳል ፩፪፫
ᎠᏂᎦᏓ ᎠᏂᏴᏫ
ᓱᓇᑐᐃᓐᓇᐃᑦ
ᚠᛇᚻ᛫ᛒᛦᚦ᛫ᚠᚱᚩᚠᚢᚱ
ᠬᠦᠮᠦᠨ ᠪᠦᠷ
人人生而自由，在尊嚴和權利上一律平等。𠮷野家、〇一二三四
すべての人間は、生まれながらにして自由である。ｶﾀｶﾅ ヴヷ ㈱ ㌔
모든 인간은 태어날 때부터 자유로우며 ㄱㄴㄷ ᄀ​ᅡ
𝒜𝓁𝓁 𝕙𝕦𝕞𝕒𝕟𝕤 𝟙𝟚𝟛 Ｆｕｌｌｗｉｄｔｈ １２３
𐌰𐌻𐌻𐌰𐌹 𐍂𐌴𐌹𐌺𐌾𐌰𐌽𐌳𐍃 𓀀𓂀 𒀭𒂗 𐤀𐤁
""".strip().split("\n")

_CODE = [
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 0x1F; }",
    '#include <stdio.h>\nint main(void)\n{\n\treturn printf("%d\\n", 42) < 0;\n}\n',
    "if x != y and not (a >= b or c <= d): pass  # TODO(me): fix",
    "SELECT name, COUNT(*) FROM t1 WHERE id IN (1,2,3) GROUP BY name HAVING COUNT(*) > 10;",
    "grep -rn --include='*.py' \"def \\w+\" . | awk -F: '{print $1}' | sort -u >out.txt 2>&1",
    '{"key": [1, 2.5e-10, null, true], "nested": {"a\\"b": "\\u00e9"}}',
    "\\begin{equation}\n\\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}\n\\end{equation}",
    "<div class=\"a b\" onclick='f(1)'><!-- c --></div>",
    "https://example.org/a/b?q=x%20y&z=1#frag mail@example.com 192.168.0.1 ::1",
    "@decorator\nasync def f(*args, **kwargs): return await g(lambda x: x**2)",
    'fn main() { let v: Vec<&\'static str> = vec!["a"; 3]; println!("{v:?}"); }',
    "    four\n        eight\n\ttab\n \t mixed\n\n\n  two",
    "a+=1;b-=2;c*=3;d/=4;e%=5;f<<=6;g>>=7;h&=8;i|=9;j^=0;k**=1;l//=2",
    "camelCaseWord snake_case_word SCREAMING_CASE kebab-case-word x1y2z3",
]

_SPACES = [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x85", "\xa0", "\u1680", "\u2003", "\u2009",
           "\u200a", "\u200b", "\u2028", "\u2029", "\u202f", "\u205f", "\u2060", "\u3000", "\u180e", "\ufeff", " \n ", "\t\t "]  # fmt: skip

_EMOJI = ["😀", "👩‍💻", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "👍🏽", "🇫🇷", "🇯🇵🇧🇷", "❤️", "❤", "1️⃣", "#️⃣", "🧑🏿‍🤝‍🧑🏻", "☃", "🫠", "©️",
          "\u200d", "\ufe0f", "👩\u200d", "\u200d💻"]  # fmt: skip

_NUMBERS = ["0", "7", "42", "007", "1234567890", "3.14", "-12.5e+10", "1,000,000", "1 000 000", "0xDEADBEEF", "2024-02-29",
            "13:45:07", "½", "¼ cup", "x²+y³", "₁₂₃", "Ⅷ", "ⅷⅸ", "①②③", "٣٤٥", "۱۲۳", "१२३", "๑๒", "１２３", "𝟘𝟙", "一二三", "〇", "1st 2nd",
            "4x4", "№5", "$9.99", "100%", "50 %", "+49 (0)30 1234", "1/2", "10⁻⁹", "π≈3", "𐄇𐄈", "፲", "꘡", "৴"]  # fmt: skip

_CONTRACTIONS = ["it's", "IT'S", "I'll've", "they're'd", "don't", "'s", " 's", "''s", "'s's", "’s it’s", "'t't", "'m3", "o'clock", "'Tis",
                 "y'all'd've", "rock'n'roll", "'ll", "'re ", "'ve\n", "s'", "'", "''", "' '", "'é", "a'ſ", "'dx"]  # fmt: skip

_SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<file_sep>", "<jupyter_code>", "<empty_output>",
            "<|im_start|", "|im_end|>", "<|im_<|im_end|>end|>", "<|IM_END|>", "<| im_end |>", "<|im_start|>user\n", "<reponame>x",
            "a<|im_end|>b", " <|im_end|> ", "<|im_end|><|im_end|>", "\n<|im_end|>\n", "1<|im_end|>1", "<filename><gh_stars>9"]  # fmt: skip

_MARKS = ["é", "e\u0301", "ñ n\u0303", "Z\u0351\u036b\u0343a\u0334l\u0321g\u0489o", "\u0301", " \u0301", "a\u0301\u0302\u0303b", "1\u0301",
          "ﬁ ﬂ ﬀ", "ǅ ǆ Ǆ", "İ i\u0307", "Å Å Å", "a\u200db", "\u202eabc\u202c", "a\u00adb", "ก\u0e49\u0e49", "\u1100\u1161\u11a8",
          "\ue000\uf8ff", "\U000f0000", "\ufffd\ufffe\uffff", "\U0010ffff", "ªº ʰʷ ˈ", "_ ‿ ⁀", "♯♭♮ ∑∫√ ≤≥ →⇒"]  # fmt: skip


def varied_strings(seed: int = 0) -> list[str]:
    """More than 900 different strings: scripts, code, white space, emoji, numbers, special tokens, controls, mixtures."""
    rng = random.Random(seed)
    fixed = ["", *_SAMPLES, *_CODE, *_SPACES, *_EMOJI, *_NUMBERS, *_CONTRACTIONS, *_SPECIAL, *_MARKS]
    fixed += [chr(i) for i in range(0xA0)] + [f"a{chr(i)}1" for i in [*range(0x20), *range(0x7F, 0xA0)]]
    fixed += [
        left + " " * n + right for n in range(1, 6) for left in ("", "a", "1", "!") for right in ("b", "2", "?", "")
    ]
    fixed += [s + t for s in _SPACES for t in ("x", "7", "é")]
    fixed += [
        part * n for part, n in zip(("a", "ab", " ", "9", "\n", "!", "=-", "é", "😀"), range(500, 50, -50), strict=True)
    ]
    fixed += TEXTS.values()
    pools = [_SAMPLES, _CODE, _SPACES, _SPACES, _EMOJI, _NUMBERS, _CONTRACTIONS, _SPECIAL, _MARKS]

    def piece():
        whole = rng.choice(rng.choice(pools))
        if rng.random() < 0.5:
            start = rng.randrange(len(whole))
            whole = whole[start : start + rng.randint(1, 12)]
        return whole

    mixed = ["".join(piece() for _ in range(rng.randint(2, 9))) for _ in range(200)]
    # Any code point at all, except surrogates, which are no text.
    bounds = [0, 0x250, 0x2000, 0x3100, 0xD800, 0xE000, 0x10000, 0x1F300, 0x1FB00, 0x30000]
    blocks = [(a, b) for a, b in itertools.pairwise(bounds) if a != 0xD800]
    wild = ["".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(rng.randint(1, 40))) for _ in range(150)]
    return list(dict.fromkeys(fixed + mixed + wild))
