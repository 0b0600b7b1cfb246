"""Makes translation_metrics.json: texts, their references, and what sacrebleu counts and scores for BLEU, chrF and TER with the
defaults of `corpus_bleu`, `corpus_chrf` and `corpus_ter`, which lm-evaluation-harness 0.4.13 uses.

    python translation_metrics.py translation_metrics.json

Made with sacrebleu 2.5.1 on Python 3.11; 2.6.0 differs only in tokenizers that are not used here.

`items` are lists of a text, its references, and the counts of `_compute_segment_statistics`: for BLEU the text's words, the
reference's words, shared sequences and all sequences of 1 to 4 words; for chrF, for each of 1 to 6 characters, sequences of the
text, of the reference and shared ones; for TER edits and the mean number of the references' words. `corpora` are lists of places
in `items`, and the three scores. Where items of a corpus have different numbers of references, the missing ones are `None`.
"""

import json
import pathlib
import random
import sys

import sacrebleu
from sacrebleu.metrics import BLEU, CHRF, TER

SEED = 20240613
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = "the a cat dog house tree red old runs sleeps sees of in on and naïve Zürich 深度 学习 don't it's U.S. 3.5 1,000 e-mail".split()
MARKS = [".", ",", "!", "?", ";", ":", "-", "--", "...", "'", '"', "(", ")", "&", "&quot;", "&amp;", "&lt;", "&gt;", "<skipped>", "%", "$5"]
SPACES = [" ", " ", " ", " ", "  ", "\t", "\n", "\u00a0", "\u3000", "\u2009", "\x1c", "\x1f", "\u0085", "-\n", "\u200b"]

# A text and its references.
CHOSEN = [
    ("", ["The cat sat."]),
    ("The cat sat.", [""]),
    ("", [""]),
    (" \t", ["\n\u00a0"]),
    ("\x1c\x1d\x1e\x1f", ["a"]),
    ("a", ["a"]),
    ("a", ["b"]),
    ("a", ["A"]),
    ("深", ["深"]),
    ("😀", ["😀"]),
    (".", ["."]),
    ("a b", ["b a"]),
    ("a b c", ["a b c"]),
    ("a b c d", ["a b c d"]),
    ("The quick brown fox jumps over the lazy dog.", ["The quick brown fox jumps over the lazy dog."]),
    ("The quick brown fox jumped over a lazy dog", ["The quick brown fox jumps over the lazy dog."]),
    ("the the the the the the the", ["The cat is on the mat, and the dog too."]),
    ("of of of of", ["of"]),
    ("of", ["of of of of"]),
    ("It cost 1,000.5 dollars.", ["It cost 1,000.50 dollars!"]),
    ("In the U.S., prices rose 3.5%.", ["In the U.S. prices rose by 3.5 %."]),
    ("1.2.3,4 .5 6. 7,", ["1.2.3 , 4 .5 6 . 7"]),
    ("...a..b.,c,,d", ["... a .. b., c ,, d"]),
    ("He said &quot;no&quot; &amp; left &lt;b&gt;.", ['He said "no" & left <b>.']),
    ("&amp;lt; &amp;amp;quot; &quot &LT;", ["&lt; &amp;quot; &quot; <"]),
    ("a well-known e-mail, 3-4 days, -5 and 5-", ["a well known e-mail, 3 - 4 days, - 5 and 5 -"]),
    ("a word bro-\nken in two-\n", ["a word broken in two-"]),
    ("one\ntwo\r\nthree\x0bfour\x0cfive", ["one two three four five"]),
    ("<skipped>one <skip<skipped>ped> two", ["one <skipped> two"]),
    ("it's John's dogs' '90s \"quoted\" (x) [y] {z}", ["it 's John 's dogs ' ' 90s \" quoted \" ( x ) [ y ] { z }"]),
    ("a/b|c\\d^e_f`g~h@i#j$k%l*m+n=o<p>q", ["a / b | c \\ d ^ e _ f ` g ~ h @ i # j $ k % l * m + n = o < p > q"]),
    ("x=1;y=2:z", ["x = 1 ; y = 2 : z"]),
    ("!?!?", ["?!?!"]),
    ("我喜欢深度学习。", ["我喜爱深度学习。"]),
    ("我 喜欢,学习.", ["我喜欢，学习。"]),
    ("東京は日本の首都です", ["日本の首都は東京です"]),
    ("안녕하세요 세계", ["세계 안녕하세요"]),
    ("Привет, МИР!", ["привет, мир!"]),
    ("ΟΔΥΣΣΕΥΣ ΣΑΣ Σ.", ["οδυσσευς σας σ."]),
    ("İstanbul IŞIK ǅ ẞ", ["i̇stanbul ışık ǆ ß"]),
    ("Ärger über Straße, naïve café", ["ärger Über STRASSE, naive café"]),
    ("cafe\u0301 e\u0301", ["café é"]),
    ("👩‍👩‍👧 ok 🇩🇪!", ["👩‍👧 ok 🇩🇪 !"]),
    ("नमस्ते दुनिया", ["दुनिया नमस्ते"]),
    ("مرحبا بالعالم", ["مرحبا يا عالم"]),
    ("١٢٣.٤", ["١٢٣ . ٤"]),
    ("٣-٤ ½-½", ["٣ - ٤ ½ - ½"]),
    (".5", [". 5"]),
    ("5.", ["5 ."]),
    ("\u00a0lead\u2009mid\u3000wide\u0085next\u2028line\u1680x ", ["lead mid wide next line x"]),
    ("zero\u200bwidth \ufeffmark", ["zero width mark"]),
    ("\ttab\x1cfile\x1dgroup\x1erecord\x1funit", ["tab file group record unit"]),
    ("a\0b", ["a b"]),
    ("aaaaaaaaaa", ["aaaaaaa"]),
    ("abcabcabc", ["cabcab"]),
    ("abcdef", ["ghijkl"]),
    ("abcde", ["abcdefgh"]),
    ("yes", ["No, this is quite a long reference for one word."]),
    ("This is quite a long text for a reference of one word.", ["yes"]),
    ("x", [" ".join(LETTERS[i % 26] for i in range(70))]),
    ("b a", [" ".join(LETTERS[i * 7 % 26] for i in range(120))]),
    (" ".join("abcd"[i % 4] for i in range(80)), ["d"]),
    (" ".join(str(i) for i in range(60)), [" ".join(str(i) for i in [*range(8, 60), *range(8)])]),
    (" ".join(str(i) for i in [*range(49, 64), *range(49)]), [" ".join(str(i) for i in range(64))]),
    (" ".join(str(i) for i in [*range(51, 65), *range(51)]), [" ".join(str(i) for i in range(65))]),
    (" ".join(str(i) for i in [*range(30), *range(43, 54), *range(30, 43)]), [" ".join(str(i) for i in range(54))]),
    (" ".join(str(i) for i in [*range(1, 51), 0, *range(51, 60)]), [" ".join(str(i) for i in range(60))]),
    (" ".join(str(i) for i in [*range(1, 52), 0, *range(52, 60)]), [" ".join(str(i) for i in range(60))]),
    # As many shifts as may be tried are reached at their limit, one below or a few above.
    ("c c b b a b a b a c c a a a c b c a b a b c b b b a c", ["b c b c a c a c b b a a b b b b c a a c a c b a c a b"]),
    ("a a a a a c a b b b c c c b b b c b a a a c b c b", ["b a b b c c b b b a b a a c b c c c a a c b a a a"]),
    ("c c c b b a b c b c b b a b a a b a b a a a a a a", ["c b b b a a a a c c a a b b c c b b a a b a a b a"]),
    # The width and the rounding of the diagonal decide.
    ("i b i g g d k b f c e h d", ["b f a f b k c i c k b a c j h d k j k g l h h i d f l b h b i h j b b k a i b i g g d k b f c e h d"]),
    ("e h c j c c c a g i k j", ["l f b c c g l c a a k a d l b a e l k i d h j b c l e e f h b l k g a e h j a c d i c j c c a g i k j"]),
    ("l d i f j k b c a b g b f f e", ["a f a a h c a c b h g c k a a c e e d j j b c b c a b j i d k a h k g c b l d i f j k b c a b g b f f e"]),
    # Blocks that are put inside themselves, and insertions that are as good as deletions.
    ("f c f a f", ["f f f c a"]),
    ("c d b d a d", ["c d d d b a"]),
    ("c h a c a", ["c a b a c"]),
    ("b a b b a", ["b b a a b"]),
    ("e d c b a", ["a b c d e"]),
    ("a b a b a b a b", ["b a b a b a b a"]),
    ("a a b b a a b b", ["b b a a b b a a"]),
    # Several references.
    ("the cat sat on the mat", ["the cat is on the mat", "there is a cat on the mat"]),
    ("a b c d", ["a b c", "a b c d e"]),
    ("a b c d", ["a b c d e", "a b c"]),
    ("a a a b", ["a a x", "a b b"]),
    ("", ["", "a"]),
    ("a", ["", ""]),
    ("a b", ["", "a b"]),
    ("ab", ["ba", "b a"]),
    ("Same.", ["Same.", "Same."]),
    ("深度学习", ["学习深度", "深 度 学 习"]),
    ("a b c d e f", ["f e d c b a", "a b c", "d e f a b c"]),
    ("It's 1,000.", ["It is 1000", "It's 1, 000.", "It's 1,000"]),
    ("", ["", "", ""]),
    ("one two", ["three four five", "six", "seven eight"]),
]


def sentence(rng, n):
    """Words and marks with spaces of all kinds."""
    parts = []
    for _ in range(n):
        parts.append(rng.choice(WORDS if rng.random() < 0.75 else MARKS))
        parts.append(rng.choice(SPACES) if rng.random() < 0.85 else "")
    return "".join(parts)


def edited(rng, words, n_edits):
    """The words with some moved, lost, doubled or replaced."""
    words = list(words)
    for _ in range(n_edits):
        at, to = rng.randrange(len(words) + 1), rng.randrange(len(words) + 1)
        block = words[at : at + rng.randrange(1, 6)]
        kind = rng.randrange(5)
        if kind < 3:
            del words[at : at + len(block)]
        if kind < 2:
            words[to:to] = block
        elif kind == 3:
            words[to:to] = block[:2]
        elif kind == 4 and block:
            words[at] = rng.choice(LETTERS)
    return words


def made(rng):
    """Pairs of random words, and of blocks that have moved."""
    pairs = []
    for _ in range(40):
        text = sentence(rng, rng.randrange(1, 14))
        pairs.append((text, ["".join(edited(rng, text, rng.randrange(5)))]))
    for n, n_letters, n_edits in [(12, 26, 2), (20, 26, 3), (20, 6, 4), (30, 8, 5), (40, 26, 6), (66, 26, 9)] * 3:
        words = [rng.choice(LETTERS[:n_letters]) for _ in range(n)]
        pairs.append((" ".join(edited(rng, words, n_edits)), [" ".join(words)]))
    # Shuffled: many moves are tried, and with few letters as many as may be.
    for n, n_letters in [(15, 3), (24, 24), (40, 4), (62, 26), (64, 3), (70, 12), (110, 26)]:
        words = [rng.choice(LETTERS[:n_letters]) for _ in range(n)]
        pairs.append((" ".join(rng.sample(words, n)), [" ".join(words)]))
    for n_references in [2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]:
        text = sentence(rng, rng.randrange(4, 9))
        pairs.append((text, ["".join(edited(rng, text, rng.randrange(4))) for _ in range(n_references)]))
    return pairs


def streams(references):
    """References as sacrebleu takes them: a list of the first ones, a list of the second ones, and so on."""
    n = max(map(len, references))
    return [[of_item[i] if i < len(of_item) else None for of_item in references] for i in range(n)]


def counts(text, references):
    """The counts of a pair by each metric."""
    metrics = [BLEU(), CHRF(), TER()]
    return [metric._extract_corpus_statistics([text], streams([references]))[0] for metric in metrics]


def scores(pairs):
    """The scores of a corpus by each metric."""
    texts, references = [text for text, _ in pairs], streams([references for _, references in pairs])
    metrics = [sacrebleu.corpus_bleu, sacrebleu.corpus_chrf, sacrebleu.corpus_ter]
    return [metric(texts, references).score for metric in metrics]


def corpora(pairs, rng):
    """Places of the items of each corpus."""
    of_size = lambda places, n: [places[i : i + n] for i in range(0, len(places), n)]
    every = list(range(len(pairs)))
    single, *several = [[i for i in every if len(pairs[i][1]) == n] for n in (1, 2, 3)]
    chosen = [[i] for i in every] + [single, every]
    for places in [single, *several]:
        chosen += of_size(places, 2) + of_size(places, 5) + of_size(places, 20)
    chosen += [[rng.choice(every) for _ in range(20)] for _ in range(5)]
    return chosen


def main(path):
    rng = random.Random(SEED)
    pairs = sorted(CHOSEN + made(rng), key=lambda pair: len(pair[1]))
    items = [[text, references, *counts(text, references)] for text, references in pairs]
    chosen = [[places, scores([pairs[i] for i in places])] for places in corpora(pairs, rng)]
    row = lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    table = lambda rows: "[\n" + ",\n".join(map(row, rows)) + "\n]"
    text = f'{{"sacrebleu":{row(sacrebleu.__version__)},\n"items":{table(items)},\n"corpora":{table(chosen)}}}\n'
    pathlib.Path(path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
