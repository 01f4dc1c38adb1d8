// When things happen: the clocks of the host and of the streams, work that was asked for and is not done, and the notes
// about a run.
//
// Each actor (the host, or a stream) counts its own steps, and carries what it knows about the steps of the others
// (a vector clock). A step has happened before another one if the other's actor knew of it. A stream knows of all that
// the host did before it gave the work; the host knows of a stream's work only once it has waited for it.
#pragma once
#include <Python.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace emulated {
namespace py = pybind11;

constexpr int kMostDevices = 8, kStreams = 8;  // streams of one device, the default stream among them
constexpr int kHost = 0;

inline int device_count() {
  static const int count = [] {
    const char* wanted = std::getenv("EMULATED_CUDA_DEVICES");
    return wanted ? std::min(std::atoi(wanted), kMostDevices) : 1;
  }();
  return count;
}

using Clock = std::vector<uint64_t>;  // actor -> number of its last step that is known

inline uint64_t step_of(const Clock& clock, int actor) { return actor < (int)clock.size() ? clock[actor] : 0; }
inline bool known(int actor, uint64_t step, const Clock& clock) { return step <= step_of(clock, actor); }
inline void learn(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size(), 0);
  for (size_t i = 0; i < other.size(); i++) clock[i] = std::max(clock[i], other[i]);
}

// Who waits for it lets go of the interpreter meanwhile: `line_of_code` asks for that while it holds the mutex.
class Mutex {
 public:
  void lock() {
    if (inner_.try_lock()) return;
    if (Py_IsInitialized() && PyGILState_Check()) {
      auto* state = PyEval_SaveThread();
      inner_.lock();
      PyEval_RestoreThread(state);
    } else {
      inner_.lock();
    }
  }
  void unlock() { inner_.unlock(); }

 private:
  std::recursive_mutex inner_;
};
inline Mutex mutex;
using Lock = std::lock_guard<Mutex>;

// ---- notes about a run ---------------------------------------------------------------------------------------------
struct Notes {
  std::map<std::string, uint64_t> waits;             // "operation @ line of code" -> how often the host waited there
  std::map<std::string, uint64_t> launches;          // operation -> kernels and copies
  std::map<std::string, uint64_t> races;             // what happened without order, and where
  std::map<std::string, uint64_t> nondeterministic;  // "operation @ line": sums in any order on a GPU
  uint64_t allocations = 0;                          // blocks of device memory
};
inline Notes notes;

// The innermost line of this project that led here, or the innermost line of all.
inline std::string line_of_code() {
  if (!Py_IsInitialized()) return "?";
  py::gil_scoped_acquire interpreter;
  std::string innermost, found;
  PyFrameObject* frame = PyEval_GetFrame();
  Py_XINCREF(frame);
  while (frame && found.empty()) {
    PyCodeObject* code = PyFrame_GetCode(frame);
    const char* name = PyUnicode_AsUTF8(code->co_filename);
    const std::string file = name ? name : "?", line = ":" + std::to_string(PyFrame_GetLineNumber(frame));
    if (innermost.empty()) innermost = file + line;
    size_t start = file.rfind("/lvlm_prune/");
    const bool installed = file.find("site-packages") != std::string::npos;
    if (start == std::string::npos && !installed) start = file.rfind("/callbacks/");
    if (start != std::string::npos) {
      const char* function = PyUnicode_AsUTF8(code->co_name);
      found = file.substr(start + 1) + line + " " + (function ? function : "");
    }
    Py_DECREF(code);
    PyFrameObject* caller = PyFrame_GetBack(frame);
    Py_DECREF(frame);
    frame = caller;
  }
  Py_XDECREF(frame);
  return !found.empty() ? found : innermost.empty() ? "no line of Python" : innermost;
}

// ---- streams -------------------------------------------------------------------------------------------------------
inline std::vector<Clock> clocks(1 + kMostDevices * kStreams);
inline thread_local int current_device = 0;
inline thread_local std::map<int, int> current_stream;  // device -> number of the stream there, 0 is the default one

inline int stream_on(int device) {
  auto found = current_stream.find(device);
  return found == current_stream.end() ? 0 : found->second;
}
inline int actor_of(int device, int stream) { return 1 + device * kStreams + stream; }
inline int actor_on(int device) { return actor_of(device, stream_on(device)); }

struct Block;
// A copy that nobody waited for: carried out when the host has, or when what it reads or writes is used on the device.
struct Pending {
  int actor;
  uint64_t step;
  std::vector<Block*> blocks;
  std::function<void()> run;
};
inline std::deque<Pending> pending;
void free_what_nothing_uses();

// Carry out what must have happened for somebody who knows that much.
inline void carry_out(const Clock& until) {
  std::vector<Pending> due;
  for (auto one = pending.begin(); one != pending.end();) {
    if (known(one->actor, one->step, until)) {
      due.push_back(std::move(*one));
      one = pending.erase(one);
    } else {
      ++one;
    }
  }
  for (auto& one : due) one.run();
  free_what_nothing_uses();
}

// A kernel or copy begins on a stream: what the host did before has happened before it.
inline uint64_t begin(int actor) {
  Clock& clock = clocks[actor];
  learn(clock, clocks[kHost]);
  if ((int)clock.size() <= actor) clock.resize(actor + 1, 0);
  return ++clock[actor];
}

// The host now knows that much; `operation` says why it waited, or is empty where it did not wait.
inline void host_learns(const Clock& clock, const std::string& operation) {
  learn(clocks[kHost], clock);
  carry_out(clocks[kHost]);
  if (!operation.empty()) notes.waits[operation + " @ " + line_of_code()]++;
}
}  // namespace emulated
