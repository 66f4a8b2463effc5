"""The lean trainer of mamldata, for MAML and its family, on ``torch.func``.

``train`` makes a run folder, ``evaluate_checkpoint`` measures what is in it:

    from trainer.evaluate import evaluate_checkpoint
    from trainer.settings import TrainSettings
    from trainer.train import train

    train(TrainSettings(steps=1000), data, "runs/first", report=print)
    print(evaluate_checkpoint("runs/first", data, split="test", episodes=600))

``data`` is anything with the methods of ``trainer.protocol.TrainData``.
"""
