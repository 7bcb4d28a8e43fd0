// The two paths of a forward. Both select the same neighbours in the same order and finish `loss`.
#pragma once

#include "../sn_types.h"
#include "identities.h"
#include "kernels.h"
#include "loss.h"

namespace sn::cpu {

// Computes every distance. Acc: float, or double for float64 features.
template <class Acc>
void forward_direct(const ForwardArgs& args, const ThreadPool& pool, const Kernels& kernels,
                    const Identities& identities, Loss<Acc>& loss);

// Returns false, with nothing written, if the rows cannot be screened.
bool forward_screen(const ForwardArgs& args, const ThreadPool& pool, const Kernels& kernels,
                    const Identities& identities, Loss<float>& loss);

// The end of forward_screen: direct distances of the entries of all lists, and the positives, offered to `loss`.
void refine(const ForwardArgs& args, const ThreadPool& pool, const Kernels& kernels, const Identities& identities,
            const Screen& screen, Loss<float>& loss);

}  // namespace sn::cpu
