#!/usr/bin/env python3
"""Write data/stories.txt and data/stories-zh.txt, the sample texts of this project.

    python data/make_stories.py            write both files beside this script
    python data/make_stories.py --check    exit 1 if they differ from a fresh run

The words and sentence frames are in data/grammar/*.txt.  A grammar file holds
three sorts of section:

    == list NAME            items parted by commas
    == rule NAME            one alternative per line
    == table NAME: a; b     one record per line, its fields parted by semicolons

and a frame may contain:

    [x|y|z]       one of these, [x|] is x or nothing; they may be nested
    {rule}        a fresh alternative of a rule or list, itself expanded
    {rule1}       the same, but chosen once per text and then kept
    {beast1.food} a field of a record that was chosen once per text
    {rule:B}      a rule in which S, the person spoken of, is person B
    {^x} {+x} {-x} {%x}   capitalised, in the plural, its last word, as a number word
    //            a new paragraph

Every text also has the persons A and C of town T, B of town U, perhaps D, the
weather W and its season, all fixed for the length of that text.
"""

import argparse
import os
import random
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 20240229
SEPARATOR = "<|endoftext|>"
VOWEL_BUT_A = re.compile(r"(one|once|uni|use|usu|ewe|eu|ute)", re.I)
MUTE_H_SO_AN = re.compile(r"(hour|honest|honour|heir)", re.I)
# Texts in a row share two towns, their people and a season, as in a book of tales.
CHAPTER = 10
IRREGULAR = {
    "loaf": "loaves",
    "knife": "knives",
    "goose": "geese",
    "shelf": "shelves",
    "leaf": "leaves",
    "foot": "feet",
    "scarf": "scarves",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "sheaf": "sheaves",
    "half": "halves",
    "trout": "trout",
}
ONES = [
    "nought",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ZH_DIGITS = "零一二三四五六七八九"


# ---------------------------------------------------------------- words


def english_number(n):
    """Spell 0..999 in English."""
    if n >= 100:
        rest = " and " + english_number(n % 100) if n % 100 else ""
        return ONES[n // 100] + " hundred" + rest
    if n < 20:
        return ONES[n]
    return TENS[n // 10] + ("-" + ONES[n % 10] if n % 10 else "")


def chinese_number(n):
    """Spell 0..199 in Chinese, with 两 for a bare two as before a measure word."""
    if n == 2:
        return "两"
    if n >= 100:
        rest = n % 100
        middle = "零" if 0 < rest < 10 else "一" if 10 <= rest < 20 else ""
        tail = "二" if rest == 2 else chinese_number(rest) if rest else ""
        return ZH_DIGITS[n // 100] + "百" + middle + tail
    if n < 10:
        return ZH_DIGITS[n]
    tens = ZH_DIGITS[n // 10] if n >= 20 else ""
    return tens + "十" + (ZH_DIGITS[n % 10] if n % 10 else "")


def plural(phrase):
    """Put the head noun of an English phrase in the plural ('jar of honey')."""
    head, of, rest = phrase.partition(" of ")
    before, space, noun = head.rpartition(" ")
    if noun in IRREGULAR:
        noun = IRREGULAR[noun]
    elif noun.endswith(("s", "x", "ch", "sh")):
        noun += "es"
    elif noun.endswith("y") and noun[-2] not in "aeiou":
        noun = noun[:-1] + "ies"
    else:
        noun += "s"
    return before + space + noun + of + rest


def capital(text):
    """Capitalise the first letter, looking past an opening quotation mark."""
    at = 1 if text[:1] in "\"'" else 0
    return text[:at] + text[at : at + 1].upper() + text[at + 1 :]


def fix_article(match):
    """Choose between a and an by the word that follows."""
    article, word = match.group(1), match.group(2)
    vowel = word[0].lower() in "aeiou" and not VOWEL_BUT_A.match(word)
    wants_an = vowel or bool(MUTE_H_SO_AN.match(word))
    return article[0] + ("n " if wants_an else " ") + word


def polish_english(paragraph):
    """Mend articles and capitals, which a frame cannot know beforehand."""
    text = re.sub(r" +", " ", paragraph).strip()
    text = re.sub(r"\b([Aa])n? ([A-Za-z]+)", fix_article, text)
    # Twice: in 'a useful a…' matches would overlap, and this is the simplest cure.
    text = re.sub(r"\b([Aa])n? ([A-Za-z]+)", fix_article, text)
    sentence_start = r'((?:\.|[.!?](?=\s)|\.")\s+"?)([a-z])'
    text = re.sub(sentence_start, lambda m: m.group(1) + m.group(2).upper(), text)
    text = re.sub(";$", ".", text)
    return "\n".join(capital(line) for line in text.split("\n"))


def polish_chinese(paragraph):
    """Take out the spaces, and the 了 that must not stand before 的时候."""
    return paragraph.replace(" ", "").replace("了的时候", "的时候").strip()


# ---------------------------------------------------------------- grammar


class Grammar:
    """The lists, rules and tables of one language, read from grammar files."""

    def __init__(self, *names):
        self.rules, self.tables = {}, {}
        for name in names:
            text = (HERE / "grammar" / name).read_text(encoding="utf-8")
            for section in re.split(r"^== ", text, flags=re.M)[1:]:
                self.add(section)

    def add(self, section):
        """Take in one section: its first line says what the others are."""
        header, *lines = section.split("\n")
        lines = [s for s in map(str.strip, lines) if s and not s.startswith("#")]
        kind, _, name = header.partition(" ")
        if kind == "table":
            name, _, fields = name.partition(":")
            self.tables[name] = read_records(fields, lines)
        elif kind == "list":
            items = (s.strip() for s in " ".join(lines).split(","))
            self.rules[name.strip()] = [s for s in items if s]
        else:
            self.rules[name.strip()] = lines


def read_records(fields, lines):
    """Turn table lines into dictionaries, insisting on the right number of fields."""
    names = [s.strip() for s in fields.split(";")]
    records = []
    for line in lines:
        values = [s.strip() for s in line.split(";")]
        if len(values) != len(names):
            raise ValueError(f"{len(values)} fields, wanted {len(names)}: {line}")
        records.append(dict(zip(names, values)))
    return records


def name_of(value):
    """What a chosen value is called: a record goes by its first field."""
    return next(iter(value.values())) if isinstance(value, dict) else value


def closing(text, at):
    """Index of the bracket that closes the one at text[at]."""
    depth = 0
    for i in range(at, len(text)):
        depth += {"[": 1, "]": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError("unclosed bracket: " + text)


def split_choices(text):
    """Split at the bars that are not inside a nested bracket."""
    parts, depth = [""], 0
    for char in text:
        depth += {"[": 1, "]": -1}.get(char, 0)
        if char == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


class Writer:
    """Expands frames; remembers what was chosen for the text in hand."""

    def __init__(self, grammar, number):
        self.grammar, self.number = grammar, number
        self.rng = random.Random(SEED)
        self.bags, self.memo = {}, {}

    def shuffled(self, items):
        """A shuffled copy, by random() alone, which is the same on every Python."""
        return [
            item
            for _, _, item in sorted((self.rng.random(), i, item) for i, item in enumerate(items))
        ]

    def choice(self, items):
        """One item at random."""
        return items[int(self.rng.random() * len(items))]

    def between(self, low, high):
        """A whole number from low to high, both included."""
        return low + int(self.rng.random() * (high - low + 1))

    def draw(self, name):
        """Next alternative of a rule or table, from a bag so that none is neglected."""
        if not self.bags.get(name):
            source = self.grammar.tables.get(name) or self.grammar.rules.get(name)
            if source is None:
                raise KeyError(f"no rule, list or table {name!r}")
            self.bags[name] = self.shuffled(source)
        return self.bags[name].pop()

    def keep(self, key):
        """The value of {key}, chosen at first use and unlike its numbered siblings."""
        if key not in self.memo:
            base = key.rstrip("0123456789")
            taken = self.names_in_use()
            for _ in range(20):
                value = self.draw(base)
                if isinstance(value, str):
                    value = self.expand(value)
                if name_of(value) not in taken:
                    break
            self.memo[key] = value
        return self.memo[key]

    def names_in_use(self):
        """Names already given out in this text, trades of its persons included."""
        values = [v for k, v in self.memo.items() if k != "S"]
        trades = [v["trade"] for v in values if isinstance(v, dict) and "trade" in v]
        return {name_of(v) for v in values + trades}

    def speaking_of(self, person, template):
        """Expand a template in which S is the given person."""
        before = self.memo.get("S")
        self.memo["S"] = person
        text = self.expand(template)
        self.memo["S"] = before
        return text

    def resolve(self, token):
        """The text that stands for {token}."""
        if token[0] in "^+-%":
            return self.modify(token[0], token[1:])
        if ":" in token:
            rule, _, who = token.partition(":")
            return self.speaking_of(self.memo[who], self.draw(rule))
        head, *path = token.split(".")
        fixed = head in self.memo or head[-1].isdigit()
        value = self.keep(head) if fixed else self.draw(head)
        if isinstance(value, dict):
            return self.field(value, path or [next(iter(value))])
        return self.expand(str(value))

    def modify(self, mark, token):
        """Resolve a token and change the form of what comes out."""
        if mark == "%":
            return self.number(self.memo[token])
        text = self.resolve(token)
        if mark == "^":
            return capital(text)
        return plural(text) if mark == "+" else text.split(" ")[-1]

    def field(self, record, path):
        """Follow a path of fields; pronouns in a person's fields are that person's."""
        person = record if "self" in record else self.memo.get("S")
        for name in path:
            if isinstance(record, str):
                raise KeyError(f"{record!r} has no field {name!r}")
            record = record[name]
        if isinstance(record, dict):
            record = name_of(record)
        return self.speaking_of(person, record)

    def expand(self, template):
        """Expand all brackets and braces of a template."""
        out, i = [], 0
        while i < len(template):
            if template[i] == "[":
                end = closing(template, i)
                out.append(self.expand(self.choice(split_choices(template[i + 1 : end]))))
            elif template[i] == "{":
                end = template.index("}", i)
                out.append(self.resolve(template[i + 1 : end]))
            else:
                end = i
                out.append(template[i])
            i = end + 1
        return "".join(out)


# ---------------------------------------------------------------- what a text is about

TASTES = ("dish", "fruit", "herb", "instrument", "colour")
SURROUNDINGS = ("beast", "tree", "flower", "festival")


def populate(writer):
    """Settle the country: who lives in which town, and what each is like in all texts.

    Fixed persons and towns make the texts learnable: whoever has read of Otto the
    potter before knows where he lives and what he eats.
    """
    tables = writer.grammar.tables
    for town in tables["town"]:
        town.update((field, writer.draw(field)) for field in SURROUNDINGS)
    pronouns = {p["gender"]: p for p in tables["pronoun"]}
    tables["cast"] = [
        make_person(writer, name, pronouns[gender])
        for gender in pronouns
        for name in writer.grammar.rules["name_" + gender]
    ]


def make_person(writer, name, pronoun):
    """A person: a name and pronouns, a home, a trade, a trait and tastes."""
    person = {"name": name, **pronoun, "home": writer.draw("town")}
    person.update((field, writer.draw(field)) for field in ("trade", "trait", *TASTES))
    return person


def another(writer, fits):
    """A person not yet in this text who fits the condition."""
    taken = [id(v) for v in writer.memo.values()]
    while True:
        person = writer.draw("cast")
        if id(person) not in taken and fits(person):
            return person


def open_chapter(writer):
    """Choose what neighbouring texts share: two towns with their people and a season."""
    tables = writer.grammar.tables
    home, abroad = writer.draw("town"), writer.draw("town")
    while abroad is home:
        abroad = writer.draw("town")
    season = writer.draw("season")
    # A text that names its month twice must name the same one.
    return {
        "T": home,
        "U": abroad,
        "season": {**season, "month": writer.expand(season["month"])},
        "skies": [w for w in tables["weather"] if w["season"] == season["name"]],
    }


def set_persons(writer):
    """A and C at home in T, B in U; D is one of those whose trade leaves traces."""
    memo, tables = writer.memo, writer.grammar.tables
    for key, town in ("A", "T"), ("C", "T"), ("B", "U"):
        trades = [id(memo[k]["trade"]) for k in "AC" if k in memo]
        memo[key] = writer.choice(
            [p for p in tables["cast"] if p["home"] is memo[town] and id(p["trade"]) not in trades]
        )
    memo["S"] = memo["A"]
    trails = {t["name"]: t for t in tables.get("trail", [])}
    if trails:
        memo["D"] = another(writer, lambda p: p["trade"]["name"] in trails)
        memo["trail1"] = trails[memo["D"]["trade"]["name"]]


def set_scene(writer, chapter):
    """Choose the persons and the weather of a new text."""
    writer.memo = dict(chapter)
    set_persons(writer)
    writer.memo["W"] = writer.choice(writer.memo.pop("skies"))


def set_shop(writer):
    """Quantities and prices whose sum, payment and change come out right."""
    memo = writer.memo
    total = 0
    for i in "123":
        memo["q" + i], memo["p" + i] = writer.between(2, 6), writer.between(2, 9)
        memo["s" + i] = memo["q" + i] * memo["p" + i]
        total += memo["s" + i]
    memo["s12"] = memo["s1"] + memo["s2"]
    memo["total"] = total
    memo["paid"] = (total // 10 + 1) * 10
    if memo["paid"] - total < 2:
        memo["paid"] += 10
    memo["change"] = memo["paid"] - total


def set_share(writer):
    """A division with a remainder."""
    memo = writer.memo
    memo["heads"], memo["each"] = writer.between(3, 9), writer.between(3, 12)
    memo["over"] = writer.between(2, memo["heads"] - 1)
    memo["shared"] = memo["heads"] * memo["each"]
    memo["all"] = memo["shared"] + memo["over"]


def set_stock(writer):
    """Five counted goods, some of one sold, and the sum of what is left."""
    memo = writer.memo
    for i in "12345":
        memo["n" + i] = writer.between(3, 19)
    memo["n1"] += 5
    memo["sold"] = writer.between(2, memo["n1"] - 2)
    memo["left"] = memo["n1"] - memo["sold"]
    memo["before"] = sum(memo["n" + i] for i in "12345")
    memo["after"] = memo["before"] - memo["sold"]


def set_contest(writer):
    """Three scores, best first, and by how much the best one won."""
    memo = writer.memo
    memo["third"] = writer.between(5, 20)
    memo["second"] = memo["third"] + writer.between(2, 7)
    memo["first"] = memo["second"] + writer.between(2, 7)
    memo["lead"] = memo["first"] - memo["second"]
    memo["sum"] = memo["first"] + memo["second"] + memo["third"]


def set_days(writer):
    """Five days in a row, for diaries and logbooks."""
    days = writer.grammar.rules["weekday"]
    start = writer.between(0, 6)
    for i in range(5):
        writer.memo[f"day{i + 1}"] = days[(start + i) % 7]
    # The highest fifth day of a month that every month has.
    date = writer.between(1, 24)
    for i in range(5):
        writer.memo[f"date{i + 1}"] = date + i


NUMBERS = (set_shop, set_share, set_stock, set_contest, set_days)


# ---------------------------------------------------------------- texts and files


def compose(writer, chapter, kind, polish):
    """One text: title, empty line, paragraphs."""
    set_scene(writer, chapter)
    for setter in NUMBERS:
        setter(writer)
    raw = writer.expand(writer.draw(kind))
    paragraphs = [polish(p) for p in raw.replace("\\n", "\n").split("//")]
    return "\n\n".join(p for p in paragraphs if p)


def collection(writer, polish, size):
    """Texts of all kinds in turn, none twice, until they fill size bytes."""
    populate(writer)
    texts, seen, filled = [], set(), 0
    while filled < size:
        if len(texts) % CHAPTER == 0:
            chapter = open_chapter(writer)
        text = compose(writer, chapter, writer.draw("kinds"), polish)
        title = text.partition("\n")[0]
        if text not in seen and title not in seen:
            seen.update((text, title))
            texts.append(text)
            filled += len(text.encode("utf-8"))
    return ("\n" + SEPARATOR + "\n").join(texts) + "\n"


def generate():
    """Both files' contents by name."""
    english = Writer(Grammar("words-en.txt", "frames-en.txt"), english_number)
    chinese = Writer(Grammar("stories-zh.txt"), chinese_number)
    return {
        "stories.txt": collection(english, polish_english, 1_500_000),
        "stories-zh.txt": collection(chinese, polish_chinese, 100_000),
    }


def write_atomically(path, content):
    """Replace a file in one step, so that no reader sees half of it."""
    draft = path.with_name(path.name + ".part")
    draft.write_bytes(content)
    os.replace(draft, path)


def main(argv=None):
    """Write the files, or with --check compare them."""
    parser = argparse.ArgumentParser(description="Write the sample texts of this project.")
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit 1 if a file is not what would be written",
    )
    check = parser.parse_args(argv).check
    stale = 0
    for name, text in generate().items():
        path, content = HERE / name, text.encode("utf-8")
        if not check:
            write_atomically(path, content)
        elif not path.exists() or path.read_bytes() != content:
            stale = 1
            print(f"{name}: not what make_stories.py writes", file=sys.stderr)
        count = text.count(SEPARATOR) + 1
        print(f"{name}: {len(content)} bytes, {count} texts", file=sys.stderr)
    return stale


if __name__ == "__main__":
    sys.exit(main())
