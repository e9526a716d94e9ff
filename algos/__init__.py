"""One algorithm, one file: an actor, and ``train(collect)``, which yields the metrics of each iteration."""
