"""Fine-tune a model on the source of Python's standard library, in a loop with accelerate."""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from stdlib_text import read_stdlib, tokenize
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="folder or name, such as what raw_loop.py saved")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", default="runs/accelerate")
args = parser.parse_args()

order = DataLoaderConfiguration(use_seedable_sampler=True)
accelerator = Accelerator(gradient_accumulation_steps=2, dataloader_config=order)
set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(args.model)
tokens = torch.from_numpy(tokenize(read_stdlib(100_000), tokenizer).astype("int64"))
rows = [{"input_ids": row, "labels": row} for row in tokens[: len(tokens) // 64 * 64].view(-1, 64)]
held_out, rows = rows[:11], rows[11:]

model = AutoModelForCausalLM.from_pretrained(args.model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
loader = DataLoader(rows, batch_size=4, shuffle=True, drop_last=True)
evaluation = DataLoader(held_out, batch_size=4)
processes = accelerator.num_processes  # each steps the schedule
scheduler = get_cosine_schedule_with_warmup(optimizer, 5 * processes, args.steps * processes)
model, optimizer, loader, evaluation, scheduler = accelerator.prepare(model, optimizer, loader, evaluation, scheduler)

model.train()
step = 0
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            accelerator.print(f"step {step:3}  loss {loss.item():.5f}  gradient norm {norm.item():.5f}")
            step += 1
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if step == args.steps:
        break

model.eval()
losses = []
for batch in evaluation:
    with torch.no_grad():
        logits = model(**batch).logits
    of_tokens = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    losses.append(accelerator.gather_for_metrics(of_tokens.mean(1)))
accelerator.print(f"held out  loss {torch.cat(losses).mean().item():.5f}")
accelerator.unwrap_model(model).save_pretrained(args.out, is_main_process=accelerator.is_main_process)
