"""Fine-tune a model on the source of Python's standard library, with Trainer."""

import argparse

import torch
from stdlib_text import read_stdlib, tokenize
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from hf_tpp import parallelize

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="folder or name, such as what raw_loop.py saved")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", default="runs/trainer")
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
parser.add_argument("--tp", type=int, default=1)
parser.add_argument("--pp", type=int, default=1)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
tokens = torch.from_numpy(tokenize(read_stdlib(100_000), tokenizer).astype("int64"))
rows = [{"input_ids": row, "labels": row} for row in tokens[: len(tokens) // 64 * 64].view(-1, 64)]

model = AutoModelForCausalLM.from_pretrained(args.model)
model = parallelize(model, tp=args.tp, pp=args.pp)
training = TrainingArguments(
    output_dir=args.out,
    max_steps=args.steps,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    weight_decay=0.1,
    warmup_steps=5,
    lr_scheduler_type="cosine",
    max_grad_norm=1.0,
    logging_steps=1,
    eval_strategy="steps",
    save_strategy="steps",
    eval_steps=10,
    save_steps=10,
    save_total_limit=2,
    load_best_model_at_end=True,
    report_to=[],
    seed=1,
)
trainer = Trainer(
    model=model,
    args=training,
    train_dataset=rows[11:],
    eval_dataset=rows[:11],
    data_collator=default_data_collator,
    processing_class=tokenizer,
)
trainer.train(resume_from_checkpoint=args.resume or None)
trainer.log_metrics("eval", trainer.evaluate())
trainer.save_model()
trainer.save_state()
