"""A small Llama-style decoder, fine-tuned by schedules with FSDP2 and tensor parallel: see ``mp_examples.py``."""
