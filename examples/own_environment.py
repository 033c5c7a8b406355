"""An environment in ten lines, by Gymnasium's API: hold a ball in the air, at the height 0, by pushing up and down."""

import gymnasium
import numpy as np


class Hover(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-10.0, 10.0, (2,), np.float32)  # height, speed
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.steps = self.np_random.uniform(-1.0, 1.0, 2), 0
        return self.state.astype(np.float32), {}

    def step(self, action):
        height, speed = self.state
        self.state, self.steps = np.clip([height + 0.1 * speed, speed + 0.3 * float(action[0])], -10, 10), self.steps + 1
        reward = -abs(height) - 0.1 * abs(speed)
        return self.state.astype(np.float32), reward, abs(height) > 5, self.steps >= 50, {}  # over; cut
