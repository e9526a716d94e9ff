"""Chunked vector environments. Importing this package registers dprl's own tasks with gymnasium."""

from gymnasium import register

register("dprl/Avoid-v0", entry_point="dprl.envs.tasks.avoid:AvoidEnv", max_episode_steps=100)
register("dprl/PushT-v0", entry_point="dprl.envs.tasks.pusht:PushT", max_episode_steps=300)
