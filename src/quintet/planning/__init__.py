"""Plans a model on many devices: memory, split, and estimated speed.

Everything follows from a config: the model is built on the meta device, no weights are read.

    config = AutoConfig.from_pretrained("deepseek-ai/DeepSeek-V3")
    plan = plan_inference(config, World.parse("2x8"), device("h100"), Workload(context=4096))
    plan.best.split, plan.best.memory.weights, plan.best.decode.tokens_per_second
"""

__all__: list[str] = []
