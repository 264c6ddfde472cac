// One chunk of a parameter update: the loop that lars_update and sgd_update share.
#pragma once

#include "common/portable.h"
#include "jointspar/sgd_update.h"

namespace jointspar {

struct UpdateSums {
    double params;  // sum of squares of the chunk's parameters, after the update and as they are stored
    double grads;   // sum of squares of the chunk's gradients, or 0 where it was not asked for
};

// Updates elements [begin, begin + size) with size <= kChunkSize; each is read and written once.
UpdateSums update_chunk(const UpdateTensor& tensor, int64_t begin, int64_t size, double local_rate, bool nesterov,
                        bool sums_grads);

}  // namespace jointspar
