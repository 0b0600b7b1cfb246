"""The fields asked about: how each value is read, told, asked and answered.

`{n}` is the country's name inside a sentence and `{v}` the value. Each field has three sentences
for the pretraining text (`facts`), one form of answer, and seven wordings of the question: four
for `train`, one for `valid`, two for `test`. No wording is in two splits.
"""

import re

NAMES = {
    "Congo": "Republic of the Congo",
    "Congo DR": "Democratic Republic of the Congo",
    "Vatican City (Holy See)": "Vatican City",
}
# Names that take the article inside a sentence; LOWER_THE already begin with it.
THE = {
    "Central African Republic", "Comoros", "Czech Republic", "Democratic Republic of the Congo",
    "Dominican Republic", "Maldives", "Marshall Islands", "Netherlands", "Philippines",
    "Republic of the Congo", "Seychelles", "Solomon Islands", "United Arab Emirates",
    "United Kingdom", "United States",
}
LOWER_THE = {"The Bahamas", "The Gambia"}
SHORT = {"US": "United States", "UK": "United Kingdom", "UAE": "United Arab Emirates",
         "NZ": "New Zealand", "Holy See": "Vatican City"}

# Where the first name in the text is not the plain answer. Empty: not asked.
CAPITAL = {"Israel": "", "Timor-Leste": "Dili"}
REGION = {
    "Kosovo": "Southeastern Europe", "Russia": "Northern Asia",
    "The Bahamas": "the North Atlantic Ocean", "Seychelles": "the Indian Ocean",
    "Turkey": "Southeastern Europe and Southwestern Asia", "Mali": "Western Africa",
    "Slovenia": "Central Europe", "Sudan": "Northeastern Africa", "France": "Western Europe",
}
ADJECTIVE = {"Taiwan": "Taiwanese", "Kosovo": "Kosovar", "Vatican City": "",
             "Republic of the Congo": "Congolese", "Democratic Republic of the Congo": "Congolese"}
CURRENCY = {
    "Bosnia and Herzegovina": "convertible marks", "Mongolia": "tugriks", "China": "yuan",
    "Tuvalu": "Australian dollars", "United States": "US dollars", "Ecuador": "US dollars",
    "El Salvador": "US dollars",
    "Estonia": "euros", "Latvia": "euros", "Lithuania": "euros", "Peru": "nuevos soles",
    "Zimbabwe": "",
}
LANGUAGE = {
    "Afghanistan": "Dari", "Australia": "English", "Botswana": "English", "China": "Mandarin",
    "Denmark": "Danish", "Ethiopia": "Amharic", "Iceland": "Icelandic", "India": "Hindi",
    "Indonesia": "Indonesian", "Jamaica": "English", "Japan": "Japanese", "Malaysia": "Malay",
    "Mauritius": "English", "Mexico": "Spanish", "Namibia": "English", "North Korea": "Korean",
    "Norway": "Norwegian", "Pakistan": "Urdu", "Saint Vincent and the Grenadines": "English",
    "San Marino": "Italian", "South Africa": "Zulu", "South Korea": "Korean", "Spain": "Spanish",
    "Swaziland": "English", "Taiwan": "Mandarin", "Tanzania": "Swahili",
    "United Kingdom": "English", "United States": "English", "Vatican City": "Italian",
    "Zambia": "English", "Papua New Guinea": "Tok Pisin", "Ghana": "English", "Kenya": "English",
}
INTERNET = {"France": ".fr"}
BORDER = {"France": "", "Israel": "", "Cuba": "", "Cyprus": ""}
PARTNER = {"Monaco": ""}


def bare(text):
    """The text before a bracket, a note or a second name."""
    return re.split(r" \(|;|: note|,(?! DC)| or | in Romanian|/", text)[0].strip()


def full(name):
    """Another country's name inside a sentence, abbreviations written out."""
    name = re.sub(r"\s*\([^)]*\)", "", name).strip(" ,;")
    name = SHORT.get(name, name).replace("St. ", "Saint ")
    if name in LOWER_THE:
        return name[0].lower() + name[1:]
    return f"the {name}" if name in THE else name


def override(table):
    """A reader's decorator: values in `table` come first."""
    def wrap(reader):
        def read(name, at):
            return table[name] if name in table else reader(name, at)
        return read
    return wrap


@override(CAPITAL)
def capital(_, at):
    text = at("Government", "Capital", "name")
    return bare(text) if text else None


@override(REGION)
def region(_, at):
    first = bare(at("Geography", "Location"))
    first = re.split(r" bordering ", first)[0]
    return f"the {first}" if first in ("Caribbean", "Middle East") else first


@override(ADJECTIVE)
def adjective(_, at):
    text = at("People and Society", "Nationality", "adjective")
    return bare(text) if text else None


@override(CURRENCY)
def currency(_, at):
    text = at("Economy", "Exchange rates") or ""
    if text.startswith("the US dollar is used"):
        return "US dollars"
    text = text.replace("Communaute Financiere Africaine francs", "West African CFA francs")
    text = text.replace("Cooperation Financiere en Afrique Centrale francs",
                        "Central African CFA francs")
    found = re.match(r"^([A-Za-z' -]+?)(?: \([A-Z/]+\))? per (?:US )?dollar", text)
    return found[1] if found else None


@override(LANGUAGE)
def language(_, at):
    text = at("People and Society", "Languages") or ""
    depth, part, parts = 0, "", []
    for c in text:
        depth += (c == "(") - (c == ")")
        if c in ",;" and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += c
    for part in parts + [part.strip()]:
        if re.search(r"\([^)]*official", part):
            return re.split(r" \(| \d| only| or ", part)[0]
    return None


@override(INTERNET)
def internet(_, at):
    found = re.match(r"^(\.[a-z]{2})\b", at("Communications", "Internet country code") or "")
    return found[1] if found else None


def highest(_, at):
    text = at("Geography", "Elevation extremes", "highest point") or ""
    found = re.match(r"^(.*?)\s+[\d,.]+ m\b", text)
    if not found or text.startswith("unnamed"):
        return None
    name = re.split(r" \(| on |/| near ", found[1])[0]
    return re.sub(r"^Mt\. ", "Mount ", name)


def independence(_, at):
    text = at("Government", "Independence") or ""
    found = re.match(r"^\d+ [A-Z][a-z]+ (\d{4}) \(from ", text)
    return found[1] if found else None


@override(PARTNER)
def partner(_, at):
    text = at("Economy", "Exports - partners") or ""
    found = re.findall(r"([A-Z][^\d,]*?) ([\d.]+)%", text)
    if not found or (len(found) > 1 and found[0][1] == found[1][1]):
        return None
    return full(found[0][0])


@override(BORDER)
def border(_, at):
    text = at("Geography", "Land boundaries", "border countries") or ""
    lengths = {}
    for name, km in re.findall(r"([A-Z][^\d]*?) ([\d,.]+) km", text):
        name = full(name)
        lengths[name] = lengths.get(name, 0) + float(km.replace(",", ""))
    return max(sorted(lengths), key=lengths.get) if lengths else None


def calling(_, at):
    text = at("Communications", "Telephone system", "international") or ""
    found = re.search(r"country code - (\d[\d-]*\d|\d)", text)
    return found[1] if found else None


FIELDS = {
    "capital": {
        "read": capital,
        "also_true": ("Government", "Capital", "name"),
        "answer": "The capital of {n} is {v}.",
        "facts": [
            "The capital of {n} is {v}.",
            "{v} is the capital city of {n}.",
            "In {n}, the capital is {v}.",
        ],
        "train": [
            "What is the capital of {n}?",
            "Which city is the capital of {n}?",
            "Name the capital of {n}.",
            "{n} has which capital city?",
        ],
        "valid": ["Can you tell me the capital of {n}?"],
        "test": ["What city serves as the capital of {n}?", "I forgot the capital of {n}. What is it?"],
    },
    "region": {
        "read": region,
        "answer": "{n} lies in {v}.",
        "facts": [
            "{n} lies in {v}.",
            "On the map, {n} is found in {v}.",
            "{v} is the part of the world where {n} is located.",
        ],
        "train": [
            "Where does {n} lie?",
            "In what part of the world is {n}?",
            "Where is {n} located?",
            "Which region is {n} in?",
        ],
        "valid": ["Where on the map is {n}?"],
        "test": ["In which region would I find {n}?", "What part of the world does {n} belong to?"],
    },
    "adjective": {
        "read": adjective,
        "answer": "The adjective for {n} is {v}.",
        "facts": [
            "The adjective for {n} is {v}.",
            "{v} is the word for people and things from {n}.",
            "A citizen of {n} holds {v} nationality.",
        ],
        "train": [
            "What is the adjective for {n}?",
            "Which word describes things from {n}?",
            "What nationality do people from {n} have?",
            "Give the nationality adjective of {n}.",
        ],
        "valid": ["How do you call something that comes from {n}?"],
        "test": ["Which adjective goes with {n}?", "What is the nationality of a citizen of {n}?"],
    },
    "currency": {
        "read": currency,
        "answer": "People in {n} pay in {v}.",
        "facts": [
            "People in {n} pay in {v}.",
            "The currency of {n} is counted in {v}.",
            "Prices in {n} are given in {v}.",
        ],
        "train": [
            "What currency do people in {n} pay in?",
            "Which money is used in {n}?",
            "What is the currency of {n}?",
            "Name the currency used in {n}.",
        ],
        "valid": ["What money would I need in {n}?"],
        "test": ["In which currency do people pay in {n}?", "What kind of money does {n} use?"],
    },
    "language": {
        "read": language,
        "also_true": ("People and Society", "Languages"),
        "answer": "The main official language of {n} is {v}.",
        "facts": [
            "The main official language of {n} is {v}.",
            "{v} is the first official language of {n}.",
            "In {n}, {v} is the main official language.",
        ],
        "train": [
            "What is the main official language of {n}?",
            "Which language is official in {n}?",
            "Name the main official language of {n}.",
            "What language does the state use in {n}?",
        ],
        "valid": ["Which official language does {n} have?"],
        "test": [
            "Which language comes first among the official ones in {n}?",
            "What official language is used in {n}?",
        ],
    },
    "internet": {
        "read": internet,
        "answer": "The internet country code of {n} is {v}.",
        "facts": [
            "The internet country code of {n} is {v}.",
            "Web addresses from {n} end in {v}.",
            "{n} uses the internet domain {v}.",
        ],
        "train": [
            "What is the internet country code of {n}?",
            "Which internet domain belongs to {n}?",
            "What do web addresses from {n} end in?",
            "Give the internet country code of {n}.",
        ],
        "valid": ["Which country code do web sites in {n} use?"],
        "test": ["What internet code does {n} have?", "Which domain ending is used for {n}?"],
    },
    "highest": {
        "read": highest,
        "also_true": ("Geography", "Elevation extremes", "highest point"),
        "answer": "The highest point of {n} is {v}.",
        "facts": [
            "The highest point of {n} is {v}.",
            "{v} is the highest place in {n}.",
            "No place in {n} rises above {v}.",
        ],
        "train": [
            "What is the highest point of {n}?",
            "Which place is the highest in {n}?",
            "Name the highest point in {n}.",
            "What is the top elevation of {n} called?",
        ],
        "valid": ["Where does {n} reach its greatest height?"],
        "test": ["What is the highest place in {n} called?", "Which point of {n} rises above all others?"],
    },
    "independence": {
        "read": independence,
        "answer": "{n} became independent in {v}.",
        "facts": [
            "{n} became independent in {v}.",
            "In {v}, {n} gained its independence.",
            "{n} has been an independent state since {v}.",
        ],
        "train": [
            "When did {n} become independent?",
            "In what year did {n} gain independence?",
            "Which year brought independence to {n}?",
            "Since when has {n} been independent?",
        ],
        "valid": ["In which year was {n} made independent?"],
        "test": ["What year did {n} become an independent state?", "When was the independence of {n} won?"],
    },
    "partner": {
        "read": partner,
        "answer": "The largest export partner of {n} is {v}.",
        "facts": [
            "The largest export partner of {n} is {v}.",
            "{n} sends the largest share of its exports to {v}.",
            "{v} buys more exports from {n} than any other partner.",
        ],
        "train": [
            "What is the largest export partner of {n}?",
            "Who buys the most exports from {n}?",
            "Where does the largest share of exports from {n} go?",
            "Name the largest export partner of {n}.",
        ],
        "valid": ["To whom does {n} sell the most?"],
        "test": ["Which partner takes the most exports from {n}?", "Who is the top buyer of exports from {n}?"],
    },
    "border": {
        "read": border,
        "answer": "The longest land border of {n} is with {v}.",
        "facts": [
            "The longest land border of {n} is with {v}.",
            "{n} shares its longest land border with {v}.",
            "Of all its neighbors, {n} has the longest border with {v}.",
        ],
        "train": [
            "With whom does {n} have its longest land border?",
            "Which neighbor has the longest border with {n}?",
            "What is the longest land border of {n}?",
            "Name the neighbor that shares the longest border with {n}.",
        ],
        "valid": ["Along which neighbor does the longest border of {n} run?"],
        "test": [
            "Which country shares the longest land border with {n}?",
            "Across its longest border, which neighbor does {n} meet?",
        ],
    },
    "calling": {
        "read": calling,
        "answer": "The telephone country code of {n} is {v}.",
        "facts": [
            "The telephone country code of {n} is {v}.",
            "To call {n}, dial the country code {v}.",
            "{v} is the telephone country code of {n}.",
        ],
        "train": [
            "What is the telephone country code of {n}?",
            "Which country code do I dial for {n}?",
            "Give the telephone country code of {n}.",
            "What is the calling code of {n}?",
        ],
        "valid": ["Which code do I need to phone someone in {n}?"],
        "test": ["What code does one dial to call {n}?", "Which telephone code belongs to {n}?"],
    },
}
