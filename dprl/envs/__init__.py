"""Environments: chunked stepping, vectors of them, collecting. Importing this registers dprl's own tasks."""

from gymnasium import register

register("dprl/Avoid-v0", entry_point="dprl.envs.avoid:AvoidEnv", max_episode_steps=100)
register("dprl/PushT-v0", entry_point="dprl.envs.pusht:PushT", max_episode_steps=300)
