"""Fine-tune a model on the source of Python's standard library, with LoRA and TRL's SFTTrainer."""

import argparse

from datasets import Dataset
from peft import LoraConfig
from stdlib_text import read_stdlib
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="folder or name, such as what raw_loop.py saved")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", default="runs/trl")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.eos_token
chunks = [text[start : start + 200] for text in read_stdlib(100_000) for start in range(0, len(text), 200)]
data = Dataset.from_list([{"prompt": chunk[:50], "completion": chunk[50:]} for chunk in chunks])

model = AutoModelForCausalLM.from_pretrained(args.model)
training = SFTConfig(
    output_dir=args.out,
    max_steps=args.steps,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    warmup_steps=5,
    max_length=64,
    bf16=False,
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=10,
    report_to=[],
    seed=1,
)
trainer = SFTTrainer(
    model=model,
    args=training,
    train_dataset=data.select(range(11, len(data))),
    eval_dataset=data.select(range(11)),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
trainer.save_state()
