"""Which drop rate is in force when: schedules, the controller that counts, and contexts."""
