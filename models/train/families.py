"""The eight task families. Each draws one task: its slots, a prompt and the only right answer.

The slots are what makes two tasks the same task whatever the wording or language: the operand pair, the set of numbers,
the person described. `data.is_held_out` decides from the slots alone, so no rewording of a held-out task is trained on.
"""

import json
from random import Random

from . import small_talk as talk
from . import words as w


def josa(word: str, after_consonant: str, after_vowel: str) -> str:
    """`word`, or a number read aloud, with the Korean particle that fits its last syllable."""
    last = "영일이삼사오육칠팔구"[int(word[-1])] if word[-1].isdigit() else word[-1]
    return word + (after_consonant if (ord(last) - 0xAC00) % 28 else after_vowel)


def compact(value: dict) -> str:
    """JSON as the model writes it: no spaces, Hangul as is."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def number(rng: Random) -> int:
    """Mostly two digits, sometimes one."""
    return rng.randint(0, 9) if rng.random() < 0.12 else rng.randint(10, 99)


def sentiment(rng: Random, lang: str):
    ko = lang == "ko"
    predicates = w.KO_PREDICATES if ko else w.EN_PREDICATES
    label = rng.choice(list(predicates))
    mild = label in ("neutral", "중립")
    subject = rng.choice(w.KO_SUBJECTS if ko else w.EN_SUBJECTS)
    predicate = rng.choice(predicates[label])
    if ko:
        adverb = rng.choice(w.KO_MILD_ADVERBS if mild else w.KO_ADVERBS)
        topic = rng.choice([subject, josa(subject, "은", "는"), josa(subject, "이", "가")])
        sentence = f"이 {topic} {adverb}{predicate}{rng.choice('.!')}{rng.choice(w.KO_TAILS)}"
        form = rng.choice(["{}", "{}", "감정을 JSON으로 분류해 줘: {}", "다음 문장의 감정은? {}", "긍정, 부정, 중립 중 무엇일까? {}"])
    else:
        adverb = rng.choice(w.EN_MILD_ADVERBS if mild else w.EN_ADVERBS)
        start = rng.choice(["The", "This", "That"])
        verb = rng.choice(["was", "is"])
        sentence = f"{start} {subject} {verb} {adverb}{predicate}{rng.choice('.!')}{rng.choice(w.EN_TAILS)}"
        form = rng.choice(["{}", "{}", "Classify the sentiment as JSON: {}", "What is the sentiment? {}",
                           "Positive, negative or neutral? {}"])
    return (subject, adverb, predicate), form.format(sentence), compact({"label": label})


def arithmetic(rng: Random, lang: str):
    a, b = number(rng), number(rng)
    if rng.random() < 0.5:
        sign, slots, answer = "+", ("+", min(a, b), max(a, b)), a + b
        spoken = f"{a} 더하기 {b}" if lang == "ko" else f"{a} plus {b}"
    else:
        if a < b and rng.random() < 0.8:
            a, b = b, a
        sign, slots, answer = "-", ("-", a, b), a - b
        spoken = f"{a} 빼기 {b}" if lang == "ko" else f"{a} minus {b}"
    sum_ = rng.choice([f"{a}{sign}{b}", f"{a} {sign} {b}", spoken])
    if lang == "ko":
        topic = josa(sum_, "은", "는")
        prompt = rng.choice([f"{topic}?", f"{sum_} 계산해 줘", f"{sum_}의 답은?", f"계산: {sum_}", f"{topic} 얼마야?"])
    else:
        prompt = rng.choice([sum_, f"{sum_} =", f"What is {sum_}?", f"Calculate {sum_}", f"Compute {sum_}."])
    return slots, prompt, str(answer)


def sorting(rng: Random, lang: str):
    values = [number(rng) for _ in range(rng.choice([3, 3, 4, 4, 5, 6]))]
    down = rng.random() < 0.4
    listed = rng.choice([", ", ", ", " "]).join(map(str, values))
    if lang == "ko":
        form = rng.choice(["큰 순서로 정렬해 줘: {}", "내림차순으로 정렬: {}", "{} 내림차순으로 정렬해 줘"] if down else
                          ["작은 순서로 정렬해 줘: {}", "오름차순으로 정렬: {}", "정렬해 줘: {}", "{} 오름차순으로 정렬해 줘"])
    else:
        form = rng.choice(["Sort from largest to smallest: {}", "Sort descending: {}", "Sort in descending order: {}"] if down else
                          ["Sort from smallest to largest: {}", "Sort ascending: {}", "Sort: {}", "Sort these numbers: {}"])
    answer = ", ".join(map(str, sorted(values, reverse=down)))
    return tuple(sorted(values)), form.format(listed), answer


def reversing(rng: Random, lang: str):
    chosen = rng.sample(w.KO_WORDS if lang == "ko" else w.EN_WORDS, rng.choice([2, 3, 3, 4, 4, 5]))
    forms = (["단어 순서를 거꾸로: {}", "단어 순서를 뒤집어 줘: {}", "거꾸로 말해 줘: {}"] if lang == "ko" else
             ["Reverse the words: {}", "Reverse the order of the words: {}", "Say these words backwards: {}"])
    return tuple(sorted(chosen)), rng.choice(forms).format(" ".join(chosen)), " ".join(reversed(chosen))


def extraction(rng: Random, lang: str):
    age = rng.randint(5, 95)
    if lang == "ko":
        name = rng.choice(w.KO_FAMILY_NAMES) + rng.choice(w.KO_GIVEN_NAMES)
        city, job = rng.choice(w.KO_CITIES), rng.choice(w.KO_JOBS)
        sentence = rng.choice([
            f"저는 {city}에 사는 {age}살 {name}입니다.",
            f"제 이름은 {name}이고 {age}살이며 {city}에 살아요.",
            f"{josa(name, '은', '는')} {age}세이고 {city}에 산다.",
            f"{city}에서 {job}로 일하는 {josa(name, '은', '는')} {age}살이다.",
        ])
        form = rng.choice(["이름, 나이, 도시를 JSON으로 추출해 줘: {}", "JSON으로 추출: {}", "{} 이름, 나이, 도시를 JSON으로."])
    else:
        name, city, job = rng.choice(w.EN_NAMES), rng.choice(w.EN_CITIES), rng.choice(w.EN_JOBS)
        sentence = rng.choice([
            f"My name is {name}, I am {age} years old and I live in {city}.",
            f"{name} is {age} and lives in {city}.",
            f"I'm {name} from {city}, {age} years old.",
            f"{name}, {job} in {city}, turned {age}.",
        ])
        form = rng.choice(["Extract name, age and city as JSON: {}", "Extract as JSON: {}", "{} Give name, age and city as JSON."])
    return (name, age, city), form.format(sentence), compact({"name": name, "age": age, "city": city})


def counting(rng: Random, lang: str):
    length = rng.randint(3, 12)
    low = rng.randint(0, 100 - length)
    high = low + length - 1
    down = rng.random() < 0.5
    start, end = (high, low) if down else (low, high)
    if lang == "ko":
        forms = ([f"{start}부터 {end}까지 거꾸로 세어 줘", f"{start}에서 {end}까지 내려가며 세어 봐"] if down else
                 [f"{start}부터 {end}까지 세어 줘", f"{start}에서 {end}까지 올라가며 세어 봐"])
    else:
        forms = ([f"Count down from {start} to {end}", f"Count backwards from {start} to {end}."] if down else
                 [f"Count from {start} to {end}", f"Count up from {start} to {end}."])
    values = range(start, end + (-1 if down else 1), -1 if down else 1)
    return (start, end), rng.choice(forms), ", ".join(map(str, values))


def comparing(rng: Random, lang: str):
    def operand():
        return rng.randint(100, 999) if wide else number(rng)
    wide = rng.random() < 0.3
    a = operand()
    b = a + rng.choice([-1, 1]) * rng.randint(0, 9) if rng.random() < 0.3 else operand()
    b = max(b, 0)
    sign = "=" if a == b else "<" if a < b else ">"
    symbols = f"{a} {sign} {b}"
    kinds = ["sign"] if a == b else ["sign", "larger", "smaller", "yes_no"]
    kind = rng.choice(kinds)
    if lang == "ko":
        forms = {"sign": [f"{a}, {b} 비교해 줘", f"{a} ? {b}", f"부등호를 넣어 줘: {a} _ {b}"],
                 "larger": [f"{a}, {b} 중 더 큰 수는?", f"어느 쪽이 더 커? {a}, {b}"],
                 "smaller": [f"{a}, {b} 중 더 작은 수는?", f"어느 쪽이 더 작아? {a}, {b}"],
                 "yes_no": [f"{a} > {b} 맞아?", f"{a} 쪽이 {b}보다 커?"]}[kind]
        yes, no = "네", "아니요"
    else:
        forms = {"sign": [f"Compare {a} and {b}", f"{a} ? {b}", f"Put the right sign: {a} _ {b}"],
                 "larger": [f"Which is larger, {a} or {b}?", f"Which number is bigger: {a} or {b}?"],
                 "smaller": [f"Which is smaller, {a} or {b}?", f"Which number is less: {a} or {b}?"],
                 "yes_no": [f"Is {a} greater than {b}?", f"Is {a} larger than {b}?"]}[kind]
        yes, no = "Yes", "No"
    answer = {"sign": symbols, "larger": str(max(a, b)), "smaller": str(min(a, b)),
              "yes_no": f"{yes if a > b else no}, {symbols}"}[kind]
    return (min(a, b), max(a, b)), rng.choice(forms), answer


def chatting(rng: Random, lang: str):
    intents = talk.KO if lang == "ko" else talk.EN
    intent = rng.choice(list(intents))
    questions, answer = intents[intent]
    question = rng.choice(questions)
    opener = rng.choice(talk.KO_OPENERS if lang == "ko" else talk.EN_OPENERS)
    closer = rng.choice(talk.KO_CLOSERS if lang == "ko" else talk.EN_CLOSERS)
    body = question if question[-1] in "?.!" or not closer.strip() or closer in (" :)", " 😊") else question + "."
    return (opener, question, closer), opener + body + closer, answer


# name -> (draw, share of the training mix). Carrying and ordering need the most examples.
FAMILIES = {
    "sentiment": (sentiment, 1),
    "arithmetic": (arithmetic, 4),
    "sorting": (sorting, 2),
    "reversing": (reversing, 1),
    "extraction": (extraction, 1),
    "counting": (counting, 1),
    "comparing": (comparing, 2),
    "chatting": (chatting, 1),
}

SYSTEM_PROMPTS = {
    "en": ["You are Glimmer, a helpful assistant.", "You are a helpful assistant.", "Answer briefly.",
           "You are a careful assistant. Answer with the result only."],
    "ko": ["당신은 친절한 도우미 Glimmer입니다.", "당신은 유용한 도우미입니다.", "짧게 대답하세요.", "결과만 정확히 대답하세요."],
}
