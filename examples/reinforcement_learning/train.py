"""Train an agent to balance CartPole's pole with proximal policy optimisation (PPO)."""

import argparse

import gymnasium
import torch
from gymnasium.vector import AutoresetMode
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional

from torchweft import Fabric


class Agent(nn.Module):
    """Observations, (n, 4), to the logits of the actions, (n, 2), and values, (n)."""

    def __init__(self, observations, actions, width=64):
        super().__init__()
        self.actor = self._network(observations, actions, width, gain=0.01)
        self.critic = self._network(observations, 1, width, gain=1.0)

    @staticmethod
    def _network(inputs, outputs, width, gain):
        layers = [nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, outputs)]
        for layer, scale in zip(layers, (2**0.5, 2**0.5, gain), strict=True):
            nn.init.orthogonal_(layer.weight, scale)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])

    def forward(self, observation):
        return self.actor(observation), self.critic(observation).squeeze(-1)


class Player:
    """Plays this process's own environments."""

    def __init__(self, envs, device, seed):
        self.envs = envs
        self.device = device
        self.observation, _ = envs.reset(seed=seed)
        self.score = torch.zeros(envs.num_envs)

    def tensor(self, array):
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def play(self, agent, steps):
        """What happened in ``steps`` steps of all environments, each (steps, environments, …),
        and the returns of the episodes that ended.
        """
        seen, returns = [], []
        for _ in range(steps):
            observation = self.tensor(self.observation)
            policy = Categorical(logits=agent(observation)[0])
            action = policy.sample()
            following, reward, terminated, truncated, info = self.envs.step(action.cpu().numpy())
            self.observation = following
            over = torch.from_numpy(terminated | truncated)
            if over.any():
                # Where an episode ended, what follows belongs to the next one already.
                following = following.copy()
                for i in over.nonzero().flatten().tolist():
                    following[i] = info["final_obs"][i]
            seen.append(
                {
                    "observation": observation,
                    "action": action,
                    "log_prob": policy.log_prob(action),
                    "reward": self.tensor(reward),
                    "following": self.tensor(following),
                    "terminated": self.tensor(terminated),
                    "over": self.tensor(over),
                }
            )
            self.score += torch.from_numpy(reward)
            returns += self.score[over].tolist()
            self.score[over] = 0
        return {key: torch.stack([step[key] for step in seen]) for key in seen[0]}, returns


@torch.no_grad()
def estimate_advantages(agent, rollout, gamma=0.99, decay=0.95):
    """Generalised advantage estimates and the returns that the critic is to predict."""
    _, value = agent(rollout["observation"])
    _, next_value = agent(rollout["following"])
    # An episode that was cut short would have gone on; one that failed is worth no more.
    target = rollout["reward"] + gamma * next_value * (1 - rollout["terminated"])
    delta = target - value
    advantage = torch.zeros_like(delta)
    last = torch.zeros_like(delta[0])
    for step in reversed(range(len(delta))):
        last = delta[step] + gamma * decay * (1 - rollout["over"][step]) * last
        advantage[step] = last
    return advantage, advantage + value


def ppo_loss(agent, batch, clip=0.2, value_weight=0.5, entropy_weight=0.01):
    logits, value = agent(batch["observation"])
    policy = Categorical(logits=logits)
    advantage = batch["advantage"]
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = (policy.log_prob(batch["action"]) - batch["log_prob"]).exp()
    gain = torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    value_loss = functional.mse_loss(value, batch["target"])
    return value_weight * value_loss - gain.mean() - entropy_weight * policy.entropy().mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--envs", type=int, default=4, help="per process")
    parser.add_argument("--rollout", type=int, default=128, help="steps between updates")
    parser.add_argument("--passes", type=int, default=4, help="over what a rollout gave")
    parser.add_argument("--batch-size", type=int, default=128, help="per process")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--max-norm", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    fabric = Fabric(accelerator=args.accelerator, devices=args.devices)
    fabric.launch()
    fabric.seed_everything(args.seed)

    envs = gymnasium.make_vec(
        "CartPole-v1",
        num_envs=args.envs,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
    )
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space.n)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, eps=1e-5)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=args.updates)
    agent, optimizer, scheduler = fabric.setup(agent, optimizer, scheduler=scheduler)

    # From here on every process acts by a random stream of its own, in environments of its own.
    torch.manual_seed(args.seed + fabric.global_rank)
    player = Player(envs, fabric.device, seed=args.seed + args.envs * fabric.global_rank)

    ended = torch.zeros(2, device=fabric.device)
    for update in range(1, args.updates + 1):
        rollout, returns = player.play(agent, args.rollout)
        rollout["advantage"], rollout["target"] = estimate_advantages(agent, rollout)
        samples = {key: value.flatten(0, 1) for key, value in rollout.items()}

        for _ in range(args.passes):
            order = torch.randperm(args.rollout * args.envs, device=fabric.device)
            for ids in order.split(args.batch_size):
                batch = {key: value[ids] for key, value in samples.items()}
                optimizer.zero_grad()
                fabric.backward(ppo_loss(agent, batch))
                fabric.clip_gradients(agent, optimizer, max_norm=args.max_norm)
                optimizer.step()
        scheduler.step()

        ended += torch.tensor([sum(returns), len(returns)], device=fabric.device)
        if update % 5 == 0:
            total, episodes = fabric.all_reduce(ended, reduce_op="sum").tolist()
            mean = total / max(1, episodes)
            fabric.print(
                f"update {update:3}/{args.updates}  episodes {episodes:3.0f}  "
                f"mean return {mean:.1f}"
            )
            ended = torch.zeros(2, device=fabric.device)
    envs.close()


if __name__ == "__main__":
    main()
