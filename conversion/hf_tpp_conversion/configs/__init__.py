"""Configurations: config.json and Megatron's args, each read into an `Architecture` and written from one."""
