"""Where each completion stands in a file, and whether it is to be graded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eval_protocol_rft.batch.dataset import RolloutDataset
from eval_protocol_rft.batch.rollouts.format import reward_columns
from eval_protocol_rft.batch.store.merge import KEY_COLUMNS, Keys


@dataclass(slots=True)
class FileIndex:
    """Nine bytes per completion."""

    place: NDArray[np.int64]
    """[data rows, n] number of the completion's row; -1 where there is none."""
    wanted: NDArray[np.bool_]
    """[data rows, n]"""

    @classmethod
    def of(
        cls, dataset: RolloutDataset, column: str, *, keep: bool, retry_unscored: bool
    ) -> FileIndex:
        """Look at all rows of a file.

        Args:
            dataset: the file.
            column: of the rewards.
            keep: rewards that are there stay, and what has one is not graded.
            retry_unscored: with `keep`, grade again what was graded and got none.
        """
        reward, _, _, error = reward_columns(column)
        columns = [*KEY_COLUMNS, "error", *([reward, error] if keep else [])]
        data_idx, sample_idx, wanted = [], [], []
        for table in dataset.tables(list(dict.fromkeys(columns))):
            data_idx.append(np.asarray(table.column("data_idx"), np.int64))
            sample_idx.append(np.asarray(table.column("sample_idx"), np.int64))
            missing = np.asarray(table.column("error").is_null())
            if keep:
                missing &= np.asarray(table.column(reward).is_null())
                if not retry_unscored:
                    missing &= np.asarray(table.column(error).is_null())
            wanted.append(missing)
        rows, samples = np.concatenate(data_idx), np.concatenate(sample_idx)
        shape = (int(rows.max()) + 1, int(samples.max()) + 1)
        index = cls(np.full(shape, -1, np.int64), np.zeros(shape, np.bool_))
        index.place[rows, samples] = np.arange(len(rows))
        index.wanted[rows, samples] = np.concatenate(wanted)
        return index

    def places(self, table: pa.Table) -> Keys:
        """[N] numbers of rows in the file; they are the order of everything here."""
        rows = np.asarray(table.column("data_idx"), np.int64)
        samples = np.asarray(table.column("sample_idx"), np.int64)
        places: Keys = self.place[rows, samples]
        return places

    def stored(self, data_idx: Keys, sample_idx: Keys) -> None:
        """These were graded by an earlier call."""
        self.wanted[data_idx, sample_idx] = False
