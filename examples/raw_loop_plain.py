"""Pretrain a small Llama on the source of Python's standard library, in a training loop of one's own."""

import argparse
import os

import torch
from stdlib_text import read_stdlib, tokenize, train_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--out", default="runs/raw-loop")
args = parser.parse_args()
is_first = os.environ.get("RANK", "0") == "0"

texts = read_stdlib(200_000)
tokenizer = train_tokenizer(texts, vocab_size=500)
tokens = torch.from_numpy(tokenize(texts, tokenizer).astype("int64"))
rows = tokens[: len(tokens) // 64 * 64].view(-1, 64)

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
)
model = AutoModelForCausalLM.from_config(config)
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=20)
generator = torch.Generator().manual_seed(1)
for step in range(args.steps):
    batch = rows[torch.randint(len(rows), (8,), generator=generator)].to(model.device)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if is_first:
        print(f"step {step:3}  loss {loss.item():.5f}  gradient norm {norm.item():.5f}")
model.save_pretrained(args.out)
if is_first:
    tokenizer.save_pretrained(args.out)
