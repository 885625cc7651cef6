"""Reference outputs of the exported models, computed by transformers in float32.

What the runtime must reproduce, and through `/v1` the gateway.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from .data import evaluation
from .evaluate import load

# Between 6 and 16 tokens each, so that logits at every position stay small enough to commit.
PROMPTS = [
    "12 + 34 =",
    "What is 47 plus 38?",
    "Sort: 31, 7, 90",
    "Count from 3 to 9",
    "Reverse the words: red apple sky",
    "Is 52 greater than 25?",
    "Hello, who are you?",
    "What is Glassgate? :)",
    "Tom is 24 and lives in Paris.",
    "This movie was so great!",
    "이 영화 정말 재미있어요!",
    "이 음식은 너무 별로예요.",
    "58 빼기 29는?",
    "정렬해 줘: 45, 9, 26",
    "7부터 11까지 세어 줘",
    "저는 서울에 사는 31살 김민수입니다.",
    "안녕하세요, 이름이 뭐예요?",
    "Nice 😊 to meet you",
    "좋아요 👍 12",
    "cafe\u0301 字 é",
]
MIN_TOKENS, MAX_TOKENS = 6, 16

TEXTS = [
    "", " ", "  ", "\n", "\n\n", "\t", " a", "a ", "  two  spaces  ", "Hello, world!", "I'm sure they'll've gone",
    "0", "7", "2024", "3.14", " 42", "a1b2", "1,234,567", "٣٤", "①½", "１２",
    "안녕하세요", "이 영화 정말 재미있어요!", "ㄱㄴㄷ ㅏㅑ", "한국어와 English 섞기", "\u1112\u1161\u11ab\u1100\u1173\u11af",
    "漢字かな交じり文", "中文字符", "😀", "👍🏽", "👩‍👩‍👧‍👦", "🇰🇷", "❤️", "\u00e9", "e\u0301", "Z͑ͫ̓ͪ̂", "שלום", "مرحبا", "नमस्ते", "ไทย",
    "\u0000\u0001\u001f", "\u007f\u0085", "\u00a0nbsp\u2003em\u3000full", "\u200b\u200d\ufeff", "\ufffd", "\U0010ffff", "\r\n",
    "line one\nline two\n", '{"label":"긍정"}', "`make run` /metrics", "a_b-c+d=e", "....!!??",
    "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>", "a<|im_end|>b", " <|im_end|> ", "<|im_start|", "<|IM_END|>",
    "supercalifragilisticexpialidocious", "ÀÉÎÕÜ ß ø Ł", "Привет мир", "Ελληνικά",
]

CHATS = [
    [("user", "12+34")],
    [("user", "47 더하기 38은?")],
    [("user", "90 - 45 =")],
    [("system", "You are Glimmer, a helpful assistant."), ("user", "What is Glassgate?")],
    [("user", "이 영화 정말 재미있어요!")],
    [("user", "Classify the sentiment as JSON: The food was really terrible.")],
    [("user", "Sort from smallest to largest: 31, 7, 90, 18")],
    [("user", "큰 순서로 정렬해 줘: 8, 64, 27")],
    [("user", "Reverse the words: river bread moon")],
    [("user", "단어 순서를 거꾸로: 사과 바다 기차")],
    [("user", "Extract name, age and city as JSON: My name is Mina, I am 24 years old and I live in Seoul.")],
    [("user", "JSON으로 추출: 저는 부산에 사는 31살 김지은입니다.")],
    [("user", "Count down from 20 to 9")],
    [("user", "3부터 12까지 세어 줘")],
    [("user", "Which is larger, 45 or 54?")],
    [("user", "345, 354 비교해 줘")],
    [("user", "Hello"), ("assistant", "Hello! How can I help you?"), ("user", "Tell me a joke")],
    [("system", "짧게 대답하세요."), ("user", "안녕하세요"), ("assistant", "안녕하세요! 무엇을 도와드릴까요?"), ("user", "날씨가 어때요?")],
    [("user", "👩‍👩‍👧‍👦 é 漢字?")],
    [("user", "")],
]
MAX_NEW_TOKENS = 48

# One in eight evaluation prompts is asked through the gateway: a hundred, of every family and both languages.
SERVED_EVERY = 8


def chat(turns: list[tuple[str, str]]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def write_logits(tokenizer, model, path: Path) -> None:
    tensors = {}
    for i, text in enumerate(PROMPTS):
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert MIN_TOKENS <= ids.shape[1] <= MAX_TOKENS, f"{text!r} has {ids.shape[1]} tokens"
        tensors[f"ids.{i}"] = ids[0].to(torch.int32)
        tensors[f"logits.{i}"] = model(ids).logits[0].float().contiguous()
    save_file(tensors, path)


def answer(tokenizer, model, messages: list[dict]) -> tuple[list[int], list[int]]:
    """The ids of prompt and greedy answer, the end token included."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    return ids[0].tolist(), out[0, ids.shape[1] :].tolist()


def greedy(tokenizer, model) -> list[dict]:
    rows = []
    for messages in map(chat, CHATS):
        _, new = answer(tokenizer, model, messages)
        rows.append({"messages": messages, "ids": new, "text": tokenizer.decode(new, skip_special_tokens=True)})
    return rows


def served(tokenizer, model) -> list[dict]:
    """Rows under the names that the ids have in an answer of the gateway."""
    rows = []
    for case in evaluation()[::SERVED_EVERY]:
        prompt, new = answer(tokenizer, model, case.messages)
        rows.append({"messages": case.messages, "prompt_token_ids": prompt, "token_ids": new})
    return rows


# Read as they are, without a template: the first tokens are the prompt, the rest is scored.
SCORED = [
    "Count: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20, and then 21 22 23 24 25.",
    "Tom is 24 and lives in Paris. Mina is 31 and lives in Seoul. 김지은 is 45 and lives in 부산.",
    "이 영화 정말 재미있어요! 이 음식은 너무 별로예요. 날씨가 어때요? 안녕하세요, 이름이 뭐예요?",
    "The hotel is quite bad! My sister said the same. That course is absolutely useless! That is what I think.",
]
SCORED_PROMPT_TOKENS = 3


def scored(tokenizer, model) -> list[dict]:
    """Log-probabilities of every token behind the prompt, and exp(-mean) of them."""
    rows = []
    for text in SCORED:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        every = model(ids).logits[0, :-1].double().log_softmax(-1)[SCORED_PROMPT_TOKENS - 1 :]
        told = every.gather(1, ids[0, SCORED_PROMPT_TOKENS:, None])[:, 0]
        rows.append({
            "text": text, "ids": ids[0].tolist(), "prompt_tokens": SCORED_PROMPT_TOKENS,
            "logprobs": [round(x, 5) for x in told.tolist()], "top": every.argmax(-1).tolist(),
            "perplexity": torch.exp(-told.mean()).item(),
        })
    return rows


# (parameters, tokens seen before) of rows of logits: what the processors of transformers leave of them.
PROCESSED = [
    ({"repetition_penalty": 1.3}, [1, 4, 4, 9]),
    ({"repetition_penalty": 0.8, "temperature": 0.7}, [0, 2, 30]),
    ({"temperature": 1.7}, []),
    ({"top_k": 5}, []),
    ({"top_p": 0.6}, []),
    ({"min_p": 0.3}, []),
    ({"temperature": 1.5, "top_k": 12, "top_p": 0.8, "min_p": 0.25}, []),
    ({"repetition_penalty": 1.2, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.05}, [3, 7, 7, 11]),
]


def processed() -> list[dict]:
    from transformers import generation

    classes = [
        ("repetition_penalty", generation.RepetitionPenaltyLogitsProcessor),
        ("temperature", generation.TemperatureLogitsWarper),
        ("top_k", generation.TopKLogitsWarper),
        ("top_p", generation.TopPLogitsWarper),
        ("min_p", generation.MinPLogitsWarper),
    ]
    torch.manual_seed(7)
    rows = []
    for params, seen in PROCESSED:
        logits = (torch.randn(1, 32) * 2).round(decimals=4)
        left = logits.clone()
        for name, make in classes:
            if name in params:
                left = make(params[name])(torch.tensor([seen], dtype=torch.long), left)
        probabilities = [round(p, 6) for p in left.double().softmax(-1)[0].tolist()]
        rows.append({
            "params": params, "seen": seen, "logits": [round(x, 4) for x in logits[0].tolist()],
            "probabilities": probabilities,
        })
    return rows


def lines(rows: list[dict]) -> str:
    """A JSON list with one row a line: readable, and a changed row is one changed line."""
    return "[\n" + ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows) + "\n]"


@torch.inference_mode()
def write(folders: dict[str, Path], target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    continuations, answers, scores = [], [], []
    for name, folder in folders.items():
        tokenizer, model = load(folder, "eager")
        write_logits(tokenizer, model, target / f"{name}.safetensors")
        continuations.append(f"{json.dumps(name)}: {lines(greedy(tokenizer, model))}")
        answers.append(f"{json.dumps(name)}: {lines(served(tokenizer, model))}")
        scores.append(f"{json.dumps(name)}: {lines(scored(tokenizer, model))}")
    # Both versions share the tokenizer, so either one speaks for it.
    tokens = [{"text": text, "ids": tokenizer.encode(text, add_special_tokens=False)} for text in TEXTS]
    chats = []
    for messages in map(chat, CHATS):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        chats.append({"messages": messages, "prompt": prompt, "ids": ids})
    (target / "text.json").write_text(
        f'{{\n"tokens": {lines(tokens)},\n"chats": {lines(chats)},\n"greedy": {{\n' + ",\n".join(continuations) + "\n}\n}\n",
        encoding="utf-8",
    )
    (target / "served.json").write_text("{\n" + ",\n".join(answers) + "\n}\n", encoding="utf-8")
    (target / "scored.json").write_text("{\n" + ",\n".join(scores) + "\n}\n", encoding="utf-8")
    (target / "processed.json").write_text(lines(processed()) + "\n", encoding="utf-8")
