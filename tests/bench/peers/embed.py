"""all-MiniLM-L6-v2 in sentence-transformers: `python embed.py MODEL_FOLDER THREADS`.

Each line of stdin is a list of texts; the answer is {"seconds": s} for one `encode` of them as one batch.
"""

import json
import sys
import time

import torch
from sentence_transformers import SentenceTransformer

FOLDER, THREADS = sys.argv[1:]
torch.set_num_threads(int(THREADS))
model = SentenceTransformer(FOLDER, device="cpu")

for line in sys.stdin:
    texts = json.loads(line)
    began = time.perf_counter()
    model.encode(texts, batch_size=len(texts), convert_to_numpy=True, show_progress_bar=False)
    print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)
