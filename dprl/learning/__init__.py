"""Parts that algorithms share: the base class, losses, learners, optimizers, replay."""
